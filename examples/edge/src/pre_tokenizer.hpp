// The pre-tokenizer of a tokenizer.json: splits a text into words; merges do not cross their borders.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace transom {

struct Word {
    std::string text;
    bool first;  // whether it begins the whole text
};

class PreTokenizer {
public:
    // Null, Sequence, Split, Digits, ByteLevel or Metaspace. Throws Error for any other.
    explicit PreTokenizer(const nlohmann::json& data);

    std::vector<Word> operator()(Word text) const;

private:
    void add(const nlohmann::json& data);

    std::vector<std::function<void(const Word&, std::vector<Word>&)>> steps_;
};

// GPT-2's printable stand-in for a byte (Radford et al. 2019, `bytes_to_unicode`), in UTF-8.
const std::string& byte_character(unsigned char byte);

}  // namespace transom
