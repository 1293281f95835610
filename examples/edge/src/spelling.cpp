#include "spelling.hpp"

#include <algorithm>
#include <cctype>

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "pre_tokenizer.hpp"
#include "unicode.hpp"

namespace transom {

namespace {

void flatten(const nlohmann::json& step, std::vector<nlohmann::json>& out) {
    if (step.at("type") != "Sequence") return out.push_back(step);
    for (const auto& inner : step.at("decoders")) flatten(inner, out);
}

}  // namespace

Spelling::Spelling(const nlohmann::json& data) {
    const auto unknown = [&data] {
        return Error("The tokenizer has a decoder that this program does not know: " + data.dump(),
                     "Decode with another library and have the program --print-ids");
    };
    if (data.is_null()) throw unknown();
    std::vector<nlohmann::json> steps;
    flatten(data, steps);
    const auto is = [](const char* type) { return [type](const nlohmann::json& step) { return step.at("type") == type; }; };
    if (std::any_of(steps.begin(), steps.end(), is("ByteLevel"))) {
        for (const auto& step : steps)
            if (step.at("type") != "ByteLevel" && step.at("type") != "Fuse") throw unknown();
        for (int byte = 0; byte < 256; ++byte)
            alphabet_[byte_character(static_cast<unsigned char>(byte))] = static_cast<char>(byte);
        return;
    }
    bool fused = false;
    for (const auto& step : steps) {
        const auto type = step.at("type").get<std::string>();
        if (type == "Replace" && step.at("pattern").contains("String") && !fused && !byte_fallback_) {
            replacements_.emplace_back(step["pattern"]["String"].get<std::string>(), step.at("content").get<std::string>());
            if (replacements_.back().first.empty()) throw unknown();
        } else if (type == "Metaspace") {
            replacements_.emplace_back(step.at("replacement").get<std::string>(), " ");
            strip_start_ = step.value("prepend_scheme", "always") == "never" ? 0 : 1;
        } else if (type == "ByteFallback") {
            byte_fallback_ = true;
        } else if (type == "Fuse") {
            fused = true;
        } else if (type == "Strip" && fused && step.at("content") == " " && step.at("stop") == 0) {
            strip_start_ += step.at("start").get<size_t>();
        } else {
            throw unknown();
        }
    }
}

std::string Spelling::of_token(const std::string& token) const {
    if (!alphabet_.empty()) {
        std::string bytes;
        for (size_t at = 0; at < token.size(); at += character_bytes(token[at])) {
            const auto found = alphabet_.find(token.substr(at, character_bytes(token[at])));
            if (found == alphabet_.end()) return token;  // plain text: a padding entry such as "[PAD 7]" with a space
            bytes += found->second;
        }
        return bytes;
    }
    const auto digit = [&token](size_t at) { return std::isxdigit(static_cast<unsigned char>(token[at])) != 0; };
    if (byte_fallback_ && token.size() == 6 && token.compare(0, 3, "<0x") == 0 && digit(3) && digit(4) && token[5] == '>')
        return {static_cast<char>(std::stoi(token.substr(3, 2), nullptr, 16))};
    return replaced(token);
}

std::string Spelling::of_added_token(const std::string& token, bool special) const {
    return special ? token : replaced(token);
}

std::string Spelling::replaced(std::string text) const {
    for (const auto& [old, wanted] : replacements_)
        for (size_t at = text.find(old); at != text.npos; at = text.find(old, at + wanted.size()))
            text.replace(at, old.size(), wanted);
    return text;
}

}  // namespace transom
