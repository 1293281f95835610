// The normalizer of a tokenizer.json: how a text changes before it is split.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace transom {

class Normalizer {
public:
    // Null, Sequence, Prepend, Replace, NFC, NFD, NFKC or NFKD. Throws Error for any other.
    explicit Normalizer(const nlohmann::json& data);

    std::string operator()(std::string text) const;

private:
    void add(const nlohmann::json& data);

    std::vector<std::function<std::string(std::string)>> steps_;
};

}  // namespace transom
