#include "sampler.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "error.hpp"

namespace transom {

namespace {

constexpr double greedy_below = 1e-5;  // dividing by less gives the argmax

uint64_t fresh_seed() {
    std::random_device device;
    return (static_cast<uint64_t>(device()) << 32) | device();
}

}  // namespace

Sampler::Sampler(Sampling how, const std::vector<int64_t>& prompt)
    : how_(std::move(how)), random_(how_.seed ? *how_.seed : fresh_seed()) {
    if (how_.repetition_penalty != 1)
        for (const int64_t id : prompt) seen_.emplace(id, 0);
}

int64_t Sampler::operator()(std::vector<float> logits) {
    adjust(logits);
    int64_t token = 0;
    for (size_t id = 0; id < logits.size(); ++id) {
        if (std::isnan(logits[id]))
            throw Error("The model's output is not a number (NaN)",
                        "Compare the bundle with its manifest by --check, or export it at a higher precision");
        if (logits[id] > logits[static_cast<size_t>(token)]) token = static_cast<int64_t>(id);
    }
    const float best = logits[static_cast<size_t>(token)];
    if (std::isinf(best)) throw Error("No token is left to choose from", "Export the model at a higher precision");
    if (how_.temperature >= greedy_below) token = draw(logits, best);
    ++seen_[token];
    return token;
}

void Sampler::adjust(std::vector<float>& logits) const {
    const auto size = static_cast<int64_t>(logits.size());
    for (const auto& [id, count] : seen_) {
        if (id < 0 || id >= size) continue;
        float& value = logits[static_cast<size_t>(id)];
        const auto penalty = static_cast<float>(how_.repetition_penalty);
        value = value < 0 ? value * penalty : value / penalty;
        value -= static_cast<float>(how_.frequency_penalty) * static_cast<float>(count);
        if (count > 0) value -= static_cast<float>(how_.presence_penalty);
    }
    for (const int64_t id : how_.suppress_ids)
        if (id >= 0 && id < size) logits[static_cast<size_t>(id)] = -std::numeric_limits<float>::infinity();
}

int64_t Sampler::draw(const std::vector<float>& logits, float best) {
    const auto temperature = static_cast<float>(how_.temperature);
    std::vector<Candidate> candidates(logits.size());
    for (size_t id = 0; id < logits.size(); ++id)
        candidates[id] = {std::exp((logits[id] - best) / temperature), static_cast<int64_t>(id)};
    const bool limited = how_.top_k > 0 && how_.top_k < static_cast<int64_t>(logits.size());
    if (limited || how_.top_p < 1 || how_.min_p > 0) candidates = kept(std::move(candidates), limited);
    double whole = 0;
    for (const Candidate& one : candidates) whole += one.weight;
    const double target = random_() * whole;
    double passed = 0;
    for (const Candidate& one : candidates) {
        passed += one.weight;
        if (passed > target) return one.id;
    }
    return std::max_element(candidates.begin(), candidates.end(),
                            [](const Candidate& a, const Candidate& b) { return a.weight < b.weight; })
        ->id;  // rounding put the target at the very end
}

// The tokens that top-k, top-p and min-p keep. Only those are sorted, however large the vocabulary is.
std::vector<Sampler::Candidate> Sampler::kept(std::vector<Candidate> all, bool limited) const {
    const auto less = [](const Candidate& a, const Candidate& b) {
        return a.weight != b.weight ? a.weight < b.weight : a.id > b.id;  // between equals, the lowest id is first
    };
    std::make_heap(all.begin(), all.end(), less);
    auto end = all.end();
    std::vector<Candidate> best;
    const size_t most = limited ? static_cast<size_t>(how_.top_k) : all.size();
    const auto next = [&] {
        std::pop_heap(all.begin(), end, less);
        return *--end;
    };
    if (limited)
        while (best.size() < most) best.push_back(next());
    if (how_.top_p < 1) {
        double whole = 0;
        for (const Candidate& one : limited ? best : all) whole += one.weight;
        const double wanted = how_.top_p * whole;
        double reached = 0;
        size_t count = 0;
        do {
            if (!limited) best.push_back(next());
            reached += best[count++].weight;
        } while (reached < wanted && count < most);
        best.resize(count);
    } else if (!limited) {
        best = std::move(all);  // only min-p, which needs no order
    }
    const auto least = static_cast<float>(how_.min_p);  // relative to the likeliest token's weight, which is 1
    best.erase(std::remove_if(best.begin(), best.end(), [least](const Candidate& c) { return c.weight < least; }),
               best.end());
    if (!limited) std::sort(best.begin(), best.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
    return best;
}

}  // namespace transom
