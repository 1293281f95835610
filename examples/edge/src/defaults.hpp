// A bundle's generation.json: the model's defaults for choosing tokens, and where an answer ends.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace transom {

// How tokens are chosen. The defaults here mean "off"; temperature 0 is greedy.
struct Sampling {
    double temperature = 0;
    int64_t top_k = 0;
    double top_p = 1;
    double min_p = 0;
    double repetition_penalty = 1;
    double presence_penalty = 0;
    double frequency_penalty = 0;
    std::vector<int64_t> suppress_ids;  // never chosen
    std::optional<uint64_t> seed;
};

// The caller's options; the model's own defaults apply to those that are not set.
struct Asked {
    std::optional<double> temperature;
    std::optional<int64_t> top_k;
    std::optional<double> top_p;
    std::optional<uint64_t> seed;
};

struct Defaults {
    std::vector<int64_t> eos_ids;
    std::vector<std::string> stop;
    std::vector<int64_t> suppress_ids;
    std::optional<int64_t> max_new_tokens;
    std::optional<bool> sample;
    std::optional<double> temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    std::optional<int64_t> top_k;

    // By the rules of Transom: the caller's value, else the model's, else greedy. With top-k or top-p but no
    // temperature, the temperature is 1. Throws Error for a value out of range.
    Sampling sampling(const Asked& asked) const;
};

// Numbers out of range are ignored: the user of a bundle cannot fix them. Throws Error: no such file, or damaged.
Defaults read_defaults(const std::filesystem::path& path);

}  // namespace transom
