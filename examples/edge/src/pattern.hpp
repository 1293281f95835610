// The patterns of a tokenizer.json, matched by PCRE2 as the `tokenizers` package matches them.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace transom {

// A part of a text, as byte offsets.
struct Span {
    size_t start;
    size_t end;
    bool match;  // whether the pattern matched it, or it lies between matches
};

class Pattern {
public:
    // A regular expression in Oniguruma's syntax, which the `tokenizers` package uses. Throws Error for what PCRE2
    // would read otherwise.
    static Pattern regex(const std::string& expression);
    // A plain text, not empty.
    static Pattern literal(const std::string& text);
    // `{"Regex": …}` or `{"String": …}`. Throws Error.
    static Pattern from_json(const nlohmann::json& data);

    // The text in parts, in order, without empty ones.
    std::vector<Span> cut(std::string_view text) const;

private:
    struct Compiled;

    std::string literal_;
    std::shared_ptr<const Compiled> compiled_;
};

}  // namespace transom
