// The pre-tokenizer of a tokenizer.json: a text is cut into the words that merges stay within.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace transom {

struct Word {
    std::string text;
    bool first;  // it begins where the whole text begins
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
