#include "added_tokens.hpp"

#include <algorithm>

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "files.hpp"
#include "unicode.hpp"

namespace transom {

AddedTokens::AddedTokens(const nlohmann::json& data, const Normalizer& normalizer) {
    if (data.is_null()) return;
    for (const auto& one : data) {
        AddedToken token;
        const int64_t id = whole_number(one.at("id"), 0, UINT32_MAX);
        token.content = one.at("content").get<std::string>();
        token.special = one.at("special").get<bool>();
        token.take_left = one.at("lstrip").get<bool>();
        token.take_right = one.at("rstrip").get<bool>();
        if (one.at("single_word").get<bool>())
            throw Error("The tokenizer matches the token " + token.content +
                            " only as a whole word, which this program does not know",
                        "Tokenize with another library and give the program --ids");
        const bool normalized = one.at("normalized").get<bool>();
        std::string text = normalized ? normalizer(token.content) : token.content;
        if (!text.empty()) {
            Index& index = normalized ? normalized_ : raw_;
            const char first = text[0];
            index[first].push_back({std::move(text), id});
        }
        tokens_[id] = std::move(token);
    }
    for (Index* index : {&raw_, &normalized_})
        for (auto& [first, entries] : *index)
            std::stable_sort(entries.begin(), entries.end(),
                             [](const Entry& a, const Entry& b) { return a.text.size() > b.text.size(); });
}

std::vector<Piece> AddedTokens::cut(std::string_view text, bool normalized, bool parse_special) const {
    const Index& index = normalized ? normalized_ : raw_;
    std::vector<Piece> pieces;
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
        const auto entries = index.find(text[at]);
        const Entry* found = nullptr;
        if (entries != index.end())
            for (const Entry& entry : entries->second)
                if (text.compare(at, entry.text.size(), entry.text) == 0) {
                    found = &entry;
                    break;
                }
        if (found == nullptr) {
            ++at;
            continue;
        }
        size_t start = at, end = at + found->text.size();
        at = end;
        const AddedToken& token = tokens_.at(found->id);
        if (token.special && !parse_special) continue;
        if (token.take_left) start = std::max(done, start - white_space_at_end(text.substr(0, start)));
        if (token.take_right) end += white_space_at_start(text.substr(end));
        if (start > done) pieces.push_back({-1, text.substr(done, start - done)});
        pieces.push_back({found->id, text.substr(start, end - start)});
        done = end;
    }
    if (done < text.size()) pieces.push_back({-1, text.substr(done)});
    return pieces;
}

}  // namespace transom
