#include "sparse_inputs.hpp"

#include <algorithm>

namespace transom {

namespace {

constexpr int64_t fewest_rows = 16;  // of a run whose rows share what they read
constexpr int64_t dense_above[] = {3, 5};  // a block that would read more than this share of its keys reads all

// The float32 nearest to 1 / count.
float share(int64_t count) { return static_cast<float>(1.0 / static_cast<double>(count)); }

std::vector<float> filled(int64_t count, float value) { return std::vector<float>(static_cast<size_t>(count), value); }

std::vector<int32_t> zeros(int64_t count) { return std::vector<int32_t>(static_cast<size_t>(count), 0); }

}  // namespace

// The start of the local window of a position's block.
int64_t SparseStep::far_end(int64_t position) const {
    return std::max<int64_t>(0, position / block - rule_.local_blocks) * block;
}

// Whether a block of queries with this last position reads every key.
bool SparseStep::reads_all(int64_t end) const {
    const int64_t far = far_end(end);
    if (end < rule_.dense_below || far == 0) return true;
    const int64_t read = std::min(rule_.chosen * rule_.unit, far) + end + 1 - far;
    return rule_.dense_by_density && read * dense_above[1] > (end + 1) * dense_above[0];
}

std::map<std::string, SparseInput> SparseStep::inputs(int64_t past, int64_t count, float mask_low) const {
    std::map<std::string, SparseInput> found;
    see(past, count, mask_low, found);
    renew(past, count, found);
    return found;
}

// What each block of queries reads, and which of its rows select.
void SparseStep::see(int64_t past, int64_t count, float mask_low, std::map<std::string, SparseInput>& found) const {
    const int64_t blocks = std::max<int64_t>(1, tokens_ / block), places = std::min(block, tokens_);
    const int64_t units = context_ / rule_.unit, nodes = context_ / rule_.node, near = rule_.near_blocks * block;
    const int64_t rows = std::min(rule_.rows, tokens_), stride = block / rule_.rows;
    const int64_t start = base(past), last = past + count - 1;
    std::vector<float> bonus = filled(blocks * units, -1), node_mask = filled(blocks * nodes, mask_low);
    std::vector<float> near_mask = filled(blocks * places * (near + tokens_), mask_low);
    std::vector<float> ranks = filled(blocks * rule_.far, 0), look_weights = filled(blocks * rows, 0);
    std::vector<int32_t> near_blocks = zeros(blocks * rule_.near_blocks), look = zeros(blocks * rows);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = start + b * block;
        const int64_t begin = std::max(first, past), end = std::min(first + places - 1, last);
        if (begin > end) continue;  // only padding: reads nothing
        const int64_t far = far_end(begin);
        const bool all = reads_all(end);
        const auto bonuses = bonus.begin() + b * units;
        std::fill_n(bonuses, far / rule_.unit, 0.0f);
        std::fill_n(bonuses, all ? far / rule_.unit : std::min(far, block) / rule_.unit, rule_.forced);
        for (int64_t rank = rule_.chosen; !all && rank < rule_.far; ++rank) ranks[b * rule_.far + rank] = mask_low;
        std::fill_n(node_mask.begin() + b * nodes, far / rule_.node, 0.0f);
        for (int64_t i = 0; i < rule_.near_blocks; ++i)
            near_blocks[b * rule_.near_blocks + i] = static_cast<int32_t>(std::min(far / block + i, context_ / block - 1));
        for (int64_t place = 0; place < places; ++place) {
            const int64_t seen = std::min(first + place, last);  // the last position that this query sees
            const auto mask = near_mask.begin() + (b * places + place) * (near + tokens_);
            const int64_t cached = std::clamp<int64_t>(std::min(seen + 1, past) - far, 0, near);
            std::fill_n(mask, cached, 0.0f);
            for (int64_t own = past; own <= seen; ++own) mask[near + own - start] = 0;
        }
        if (tokens_ == 1) continue;
        std::vector<int64_t> chosen;  // the last row of every few
        for (int64_t row = begin + stride - 1; row <= end; row += stride) chosen.push_back(row - start);
        if (chosen.empty()) chosen.push_back(end - start);
        for (int64_t i = 0; i < rows; ++i) {
            const bool there = i < static_cast<int64_t>(chosen.size());
            look[b * rows + i] = static_cast<int32_t>(there ? chosen[static_cast<size_t>(i)] : chosen.back());
            if (there) look_weights[b * rows + i] = share(static_cast<int64_t>(chosen.size()));
        }
    }
    found["unit_bonus"] = {{1, blocks, 1, units}, std::move(bonus)};
    found["mask_nodes"] = {{1, blocks, 1, nodes}, std::move(node_mask)};
    found["mask_near"] = {{1, blocks, places, near + tokens_}, std::move(near_mask)};
    found["near_blocks"] = {{1, blocks * rule_.near_blocks}, std::move(near_blocks)};
    if (rule_.far > rule_.chosen) found["mask_rank"] = {{1, blocks, 1, rule_.far}, std::move(ranks)};
    if (tokens_ == 1) return;
    found["look"] = {{blocks, 1, rows}, std::move(look)};
    found["look_weights"] = {{1, blocks, rows, 1}, std::move(look_weights)};
}

// The nodes that the step's tokens belong to, and which of their keys exist.
void SparseStep::renew(int64_t past, int64_t count, std::map<std::string, SparseInput>& found) const {
    const int64_t first = past / piece() * piece(), last = past + count - 1, pieces = renewed() / piece();
    std::vector<int32_t> at = zeros(pieces);
    for (int64_t i = 0; i < pieces; ++i)
        at[i] = static_cast<int32_t>(std::min(first / piece() + i, context_ / piece() - 1));
    std::vector<float> cached = filled(renewed(), 0), weights = filled(renewed(), 0);
    for (int64_t i = 0; i < renewed(); ++i) {
        const int64_t node = first + i / rule_.node * rule_.node;  // its first key
        if (first + i < past) cached[i] = 1;
        if (first + i <= last) weights[i] = share(std::min(rule_.node, last + 1 - node));
    }
    found["node_at"] = {{1, pieces}, std::move(at)};
    found["node_cached"] = {{1, 1, renewed(), 1}, std::move(cached)};
    found["node_weights"] = {{1, renewed_nodes(), rule_.node, 1}, std::move(weights)};
}

std::vector<int64_t> sparse_runs(int64_t chunk, int64_t past, int64_t count) {
    if (count < fewest_rows) return std::vector<int64_t>(static_cast<size_t>(count), 1);
    const int64_t first = std::min(count, chunk - past % SparseStep::block);
    return first < count ? std::vector<int64_t>{first, count - first} : std::vector<int64_t>{first};
}

}  // namespace transom
