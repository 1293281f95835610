// A bundle's generation.json: how the model wants its tokens to be chosen, and where an answer ends.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace transom {

// How tokens are chosen. The values that stand here are "off"; temperature 0 is greedy.
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

// What a caller asks for; where it says nothing, the model's own defaults hold.
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

    // By the rules of Transom: the caller's value, else the model's, else greedy; who names top-k or top-p and no
    // temperature wants to sample at 1. Throws Error for a value out of its range.
    Sampling sampling(const Asked& asked) const;
};

// Numbers out of their range are left out: whoever runs the bundle cannot mend it. Throws Error: no such file, or damaged.
Defaults read_defaults(const std::filesystem::path& path);

}  // namespace transom
