// A tokenizer.json of Hugging Face: text to token ids and back, with the same ids as the `tokenizers` package. An
// unsupported part is an error that names it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "added_tokens.hpp"
#include "bpe.hpp"
#include "normalizer.hpp"
#include "pre_tokenizer.hpp"
#include "spelling.hpp"
#include "unicode.hpp"

namespace transom {

struct Encoding {
    bool add_special = true;    // beginning and end tokens; a rendered chat template already has them
    bool parse_special = true;  // read <|im_end|> and the like in the text as tokens
};

class Tokenizer {
public:
    // Throws Error: no such file, damaged, or an unsupported kind.
    static Tokenizer open(const std::filesystem::path& path);

    // Throws Error if the text is not UTF-8.
    std::vector<int64_t> encode(std::string_view text, const Encoding& how = {}) const;
    // The bytes of a token; empty for special tokens and for an id without a token.
    std::string bytes(int64_t id) const;
    size_t strip_start() const { return spelling_.strip_start(); }

private:
    explicit Tokenizer(const nlohmann::json& data);

    void read_ends(const nlohmann::json& processor);

    Normalizer normalizer_;
    AddedTokens added_;
    PreTokenizer cut_;
    Bpe bpe_;
    Spelling spelling_;
    std::vector<int64_t> before_, after_;  // tokens that the post-processor puts around a text
};

// Text from a stream of token ids. An unfinished character is held back.
class Detokenizer {
public:
    explicit Detokenizer(const Tokenizer& tokenizer) : tokenizer_(tokenizer), strip_(tokenizer.strip_start()) {}

    std::string push(int64_t id);
    std::string finish() { return stream_.finish(); }

private:
    const Tokenizer& tokenizer_;
    size_t strip_;
    Utf8Stream stream_;
};

}  // namespace transom
