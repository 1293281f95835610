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
    bool match;  // matched by the pattern; false: between matches
};

class Pattern {
public:
    // A regular expression in Oniguruma's syntax, which the `tokenizers` package uses. Throws Error for syntax
    // that PCRE2 would interpret differently.
    static Pattern regex(const std::string& expression);
    // A plain, non-empty text.
    static Pattern literal(const std::string& text);
    // `{"Regex": …}` or `{"String": …}`. Throws Error.
    static Pattern from_json(const nlohmann::json& data);

    // The parts of the text, in order, without empty ones.
    std::vector<Span> cut(std::string_view text) const;

private:
    struct Compiled;

    std::string literal_;
    std::shared_ptr<const Compiled> compiled_;
};

}  // namespace transom
