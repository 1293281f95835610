#include "normalizer.hpp"

#include <cstdlib>
#include <map>
#include <memory>

#include <nlohmann/json.hpp>
#include <utf8proc.h>

#include "error.hpp"
#include "pattern.hpp"

namespace transom {

namespace {

// A Unicode normal form (UAX #15).
std::string normal_form(const std::string& text, int form) {
    utf8proc_uint8_t* result = nullptr;
    const auto bytes = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                    static_cast<utf8proc_ssize_t>(text.size()), &result,
                                    static_cast<utf8proc_option_t>(UTF8PROC_STABLE | form));
    const std::unique_ptr<utf8proc_uint8_t, void (*)(void*)> owner(result, std::free);
    if (bytes < 0)
        throw Error(std::string("The text cannot be normalized: ") + utf8proc_errmsg(bytes), "Give text in UTF-8");
    return {reinterpret_cast<const char*>(result), static_cast<size_t>(bytes)};
}

const std::map<std::string, int> forms = {
    {"NFC", UTF8PROC_COMPOSE},
    {"NFD", UTF8PROC_DECOMPOSE},
    {"NFKC", UTF8PROC_COMPOSE | UTF8PROC_COMPAT},
    {"NFKD", UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT},
};

}  // namespace

Normalizer::Normalizer(const nlohmann::json& data) {
    if (!data.is_null()) add(data);
}

void Normalizer::add(const nlohmann::json& data) {
    const auto type = data.at("type").get<std::string>();
    if (type == "Sequence") {
        for (const auto& one : data.at("normalizers")) add(one);
    } else if (type == "Prepend") {
        steps_.emplace_back([prefix = data.at("prepend").get<std::string>()](std::string text) {
            return text.empty() ? text : prefix + text;
        });
    } else if (type == "Replace") {
        steps_.emplace_back(
            [pattern = Pattern::from_json(data.at("pattern")), content = data.at("content").get<std::string>()](
                const std::string& text) {
                std::string out;
                for (const Span& span : pattern.cut(text))
                    out += span.match ? content : text.substr(span.start, span.end - span.start);
                return out;
            });
    } else if (const auto form = forms.find(type); form != forms.end()) {
        steps_.emplace_back([kind = form->second](const std::string& text) { return normal_form(text, kind); });
    } else {
        throw Error("The tokenizer has the normalizer " + type + ", which this program does not know",
                    "Tokenize with another library and give the program --ids");
    }
}

std::string Normalizer::operator()(std::string text) const {
    for (const auto& step : steps_) text = step(std::move(text));
    return text;
}

}  // namespace transom
