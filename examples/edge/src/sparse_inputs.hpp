// What the host hands to a graph with sparse attention beside tokens and caches: all of it follows from the position.
// docs/mobile-export.md has the meaning of each input.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace transom {

// `sparse` of qnn.json.
struct SparseRule {
    int64_t unit, node, rows;  // divisors of a block; a unit holds whole nodes
    int64_t local_blocks, near_blocks;
    int64_t chosen, far;  // units that are chosen at most, and that are gathered
    int64_t dense_below;
    bool dense_by_density;
    float forced;
};

// An input of a graph: float32 or int32.
struct SparseInput {
    std::vector<int64_t> shape;
    std::variant<std::vector<float>, std::vector<int32_t>> numbers;
};

// A step of fixed size, which is one token or a multiple of 64, over a cache of `context` tokens, a multiple of 64.
class SparseStep {
public:
    static constexpr int64_t block = 64;  // queries that read the same units; tokens of a block of the cache

    SparseStep(const SparseRule& rule, int64_t context, int64_t tokens)
        : rule_(rule), context_(context), tokens_(tokens) {}

    // The position of the step's row 0, with `past` tokens in the cache.
    int64_t base(int64_t past) const { return tokens_ == 1 ? past : past / block * block; }
    // Where the step's new means and variances go among the nodes.
    int64_t first_node(int64_t past) const { return past / piece() * piece() / rule_.node; }
    // Nodes that are made anew.
    int64_t renewed_nodes() const { return renewed() / rule_.node; }
    // By name; `count` new tokens, which fit into the step behind those from `base` to `past`.
    std::map<std::string, SparseInput> inputs(int64_t past, int64_t count, float mask_low) const;

private:
    int64_t renewed() const { return tokens_ == 1 ? rule_.node : tokens_; }  // keys whose nodes are made anew
    int64_t piece() const { return renewed() < block ? renewed() : block; }  // of these, read from the cache together
    int64_t far_end(int64_t position) const;
    bool reads_all(int64_t end) const;
    void see(int64_t past, int64_t count, float mask_low, std::map<std::string, SparseInput>& found) const;
    void renew(int64_t past, int64_t count, std::map<std::string, SparseInput>& found) const;

    SparseRule rule_;
    int64_t context_, tokens_;
};

// How a step of so many tokens is cut into runs: few tokens go one by one, since each of their queries chooses for
// itself, and a run of more begins at a multiple of 64. `chunk`: the most tokens of a run, and of the step.
std::vector<int64_t> sparse_runs(int64_t chunk, int64_t past, int64_t count);

}  // namespace transom
