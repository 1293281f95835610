// Byte-pair encoding (Sennrich et al. 2016): a word to token ids by merges, as in the `tokenizers` package.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace transom {

class Bpe {
public:
    // The `model` of a tokenizer.json. Throws Error for a kind other than BPE, or an unsupported option.
    explicit Bpe(const nlohmann::json& data);

    // Append the ids of one word.
    void encode(const std::string& word, std::vector<int64_t>& ids) const;
    // The text of each id that has one.
    const std::unordered_map<int64_t, std::string>& tokens() const { return tokens_; }

private:
    struct Merge {
        uint32_t rank;
        int64_t id;
    };

    int64_t find(const std::string& token) const;
    const Merge* merge(int64_t left, int64_t right) const;
    std::vector<int64_t> characters(const std::string& word) const;

    std::unordered_map<std::string, int64_t> vocabulary_;
    std::unordered_map<uint64_t, Merge> merges_;
    std::unordered_map<int64_t, std::string> tokens_;
    int64_t unknown_ = -1;
    bool fuse_unknown_ = false;
    bool byte_fallback_ = false;
    bool ignore_merges_ = false;
};

}  // namespace transom
