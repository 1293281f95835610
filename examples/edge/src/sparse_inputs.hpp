// The inputs of a graph with sparse attention other than tokens and caches. All of them follow from the position.
// docs/mobile-export.md gives the meaning of each input.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace transom {

// The object `sparse` of qnn.json.
struct SparseRule {
    int64_t unit, node, rows;  // divisors of a block; a unit consists of whole nodes
    int64_t local_blocks, near_blocks;
    int64_t chosen, far;  // most units selected; units gathered
    int64_t dense_below;
    bool dense_by_density;
    float forced;
};

// An input of a graph: float32 or int32.
struct SparseInput {
    std::vector<int64_t> shape;
    std::variant<std::vector<float>, std::vector<int32_t>> numbers;
};

// A step of fixed size (one token or a multiple of 64) over a cache of `context` tokens (a multiple of 64).
class SparseStep {
public:
    static constexpr int64_t block = 64;  // queries that share their units; tokens in a block of the cache

    SparseStep(const SparseRule& rule, int64_t context, int64_t tokens)
        : rule_(rule), context_(context), tokens_(tokens) {}

    // The position of the step's row 0, with `past` tokens in the cache.
    int64_t base(int64_t past) const { return tokens_ == 1 ? past : past / block * block; }
    // The index of the step's first new mean and variance among the nodes.
    int64_t first_node(int64_t past) const { return past / piece() * piece() / rule_.node; }
    // Nodes that are recomputed.
    int64_t renewed_nodes() const { return renewed() / rule_.node; }
    // Inputs by name, for `count` new tokens; they must fit into the step after those from `base` to `past`.
    std::map<std::string, SparseInput> inputs(int64_t past, int64_t count, float mask_low) const;

private:
    int64_t renewed() const { return tokens_ == 1 ? rule_.node : tokens_; }  // keys whose nodes are recomputed
    int64_t piece() const { return renewed() < block ? renewed() : block; }  // keys read from the cache together
    int64_t far_end(int64_t position) const;
    bool reads_all(int64_t end) const;
    void see(int64_t past, int64_t count, float mask_low, std::map<std::string, SparseInput>& found) const;
    void renew(int64_t past, int64_t count, std::map<std::string, SparseInput>& found) const;

    SparseRule rule_;
    int64_t context_, tokens_;
};

// Splits a step of this many tokens into runs. Few tokens run one by one, because each of their queries selects for
// itself; a run of more begins at a multiple of 64. `chunk`: the most tokens in a run, and in the step.
std::vector<int64_t> sparse_runs(int64_t chunk, int64_t past, int64_t count);

}  // namespace transom
