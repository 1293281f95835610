// The added tokens of a tokenizer.json, special and others, which are matched before a text is split.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "normalizer.hpp"

namespace transom {

struct AddedToken {
    std::string content;
    bool special = false;
    bool take_left = false;   // `lstrip`: includes white space before it
    bool take_right = false;  // `rstrip`
};

// A part of a text: a token, or text between tokens if `id` is below 0.
struct Piece {
    int64_t id;
    std::string_view text;
};

class AddedTokens {
public:
    // The list `added_tokens`. Throws Error for an unsupported option.
    AddedTokens(const nlohmann::json& data, const Normalizer& normalizer);

    // Split a text at tokens that are matched before it is normalized, or at those that are matched afterwards.
    // `parse_special`: false leaves special tokens as plain text.
    std::vector<Piece> cut(std::string_view text, bool normalized, bool parse_special) const;
    const std::map<int64_t, AddedToken>& by_id() const { return tokens_; }

private:
    struct Entry {
        std::string text;
        int64_t id;
    };
    // By first byte, the longest first, so that the first match is the longest.
    using Index = std::unordered_map<char, std::vector<Entry>>;

    std::map<int64_t, AddedToken> tokens_;
    Index raw_, normalized_;
};

}  // namespace transom
