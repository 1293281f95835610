// The decoder of a tokenizer.json: the bytes of a single token, so that text can be streamed.
#pragma once

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace transom {

class Spelling {
public:
    // ByteLevel, or a sequence of Replace, ByteFallback, Fuse, Strip and Metaspace. Throws Error if the text of a
    // token depends on its neighbors in another way.
    explicit Spelling(const nlohmann::json& data);

    // The bytes of a token of the vocabulary.
    std::string of_token(const std::string& token) const;
    // The bytes of an added token, which is its own text.
    std::string of_added_token(const std::string& token, bool special) const;
    // The spaces to drop from the start of a text: the dummy prefix that encoding adds.
    size_t strip_start() const { return strip_start_; }

private:
    std::string replaced(std::string text) const;

    std::unordered_map<std::string, char> alphabet_;  // not empty: tokens are written in GPT-2's byte alphabet
    bool byte_fallback_ = false;                      // a token <0x0A> is the byte 0x0A
    std::vector<std::pair<std::string, std::string>> replacements_;
    size_t strip_start_ = 0;
};

}  // namespace transom
