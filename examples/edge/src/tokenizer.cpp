#include "tokenizer.hpp"

#include <stdexcept>

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "files.hpp"

namespace transom {

namespace {

nlohmann::json part(const nlohmann::json& data, const char* name) {
    const auto found = data.find(name);
    return found == data.end() ? nlohmann::json() : *found;
}

Error damaged(const std::filesystem::path& path, const std::string& how) {
    return {path.string() + " is damaged, or of a form that this program does not know: " + how,
            "Copy the bundle again from where it was made"};
}

}  // namespace

Tokenizer Tokenizer::open(const std::filesystem::path& path) {
    try {
        return Tokenizer(read_json(path));
    } catch (const nlohmann::json::exception& error) {
        throw damaged(path, error.what());
    } catch (const std::out_of_range&) {
        throw damaged(path, "a token id is invalid");
    }
}

Tokenizer::Tokenizer(const nlohmann::json& data)
    : normalizer_(part(data, "normalizer")),
      added_(part(data, "added_tokens"), normalizer_),
      cut_(part(data, "pre_tokenizer")),
      bpe_(data.at("model")),
      spelling_(part(data, "decoder")) {
    if (const auto processor = part(data, "post_processor"); !processor.is_null()) read_ends(processor);
}

void Tokenizer::read_ends(const nlohmann::json& processor) {
    const auto type = processor.at("type").get<std::string>();
    if (type == "Sequence") {
        for (const auto& one : processor.at("processors")) read_ends(one);
    } else if (type == "TemplateProcessing" && before_.empty() && after_.empty()) {
        std::vector<int64_t>* side = &before_;
        for (const auto& item : processor.at("single")) {
            if (item.contains("Sequence")) {
                side = &after_;
                continue;
            }
            const auto token = item.at("SpecialToken").at("id").get<std::string>();
            for (const auto& id : processor.at("special_tokens").at(token).at("ids"))
                side->push_back(whole_number(id, 0, UINT32_MAX));
        }
    } else if (type != "ByteLevel") {  // which only changes offsets
        throw Error("The tokenizer has the post-processor " + type + ", which this program does not know",
                    "Tokenize with another library and give the program --ids");
    }
}

std::vector<int64_t> Tokenizer::encode(std::string_view text, const Encoding& how) const {
    if (!is_utf8(text)) throw Error("The text is not valid UTF-8", "Give it in UTF-8");
    std::vector<int64_t> ids;
    if (how.add_special) ids = before_;
    for (const Piece& raw : added_.cut(text, false, how.parse_special)) {
        if (raw.id >= 0) {
            ids.push_back(raw.id);
            continue;
        }
        const std::string normal = normalizer_(std::string(raw.text));
        for (const Piece& piece : added_.cut(normal, true, how.parse_special)) {
            if (piece.id >= 0) {
                ids.push_back(piece.id);
                continue;
            }
            const bool first = raw.text.data() == text.data() && piece.text.data() == normal.data();
            for (const Word& word : cut_({std::string(piece.text), first})) bpe_.encode(word.text, ids);
        }
    }
    if (how.add_special) ids.insert(ids.end(), after_.begin(), after_.end());
    return ids;
}

std::string Tokenizer::bytes(int64_t id) const {
    if (const auto added = added_.by_id().find(id); added != added_.by_id().end())
        return added->second.special ? "" : spelling_.of_added_token(added->second.content, false);
    const auto found = bpe_.tokens().find(id);
    return found == bpe_.tokens().end() ? "" : spelling_.of_token(found->second);
}

std::string Detokenizer::push(int64_t id) {
    std::string bytes = tokenizer_.bytes(id);
    while (strip_ > 0 && !bytes.empty()) {
        if (bytes[0] != ' ') {
            strip_ = 0;
            break;
        }
        bytes.erase(0, 1);
        --strip_;
    }
    return stream_.push(bytes);
}

}  // namespace transom
