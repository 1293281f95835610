// From a row of logits to a token, with the order of operations and the random numbers of Transom's own sampler.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "defaults.hpp"
#include "random.hpp"

namespace transom {

class Sampler {
public:
    // `prompt`: ids that count as seen for the repetition penalty.
    Sampler(Sampling how, const std::vector<int64_t>& prompt);

    // Choose the next token and remember it. Throws Error if the logits are NaN, or every token is ruled out.
    int64_t operator()(std::vector<float> logits);

private:
    struct Candidate {
        float weight;  // its probability divided by that of the likeliest token
        int64_t id;
    };

    void adjust(std::vector<float>& logits) const;
    int64_t draw(const std::vector<float>& logits, float best);
    std::vector<Candidate> kept(std::vector<Candidate> all, bool limited) const;

    Sampling how_;
    Random random_;
    std::unordered_map<int64_t, int64_t> seen_;  // id → occurrences in the answer; 0: only in the prompt
};

}  // namespace transom
