// What qnn.json says of a variant: sizes, caches, files (docs/mobile-export.md).
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "onnxruntime_library.hpp"
#include "sparse_inputs.hpp"

namespace transom {

struct QnnDescription {
    struct Layer {
        int64_t kv_heads, head_dim, value_dim;
        int64_t window;    // tokens that a query sees, itself included; 0: all
        int64_t choosing;  // KV heads that choose what they read; 0 with dense attention
    };
    struct Part {
        std::string prefill, decode;
    };

    int64_t context, chunk, vocabulary, hidden;
    std::string embedding_file;
    ONNXTensorElementDataType embedding_type, cache_type;
    float embedding_scale, mask_low;
    std::vector<Layer> layers;
    std::vector<Part> parts;
    std::optional<SparseRule> sparse;
};

// Bytes of one number.
size_t element_bytes(ONNXTensorElementDataType type);

// Every number in what is returned is within bounds: products of four of them are no larger than 63 bits. Throws Error.
QnnDescription read_qnn_description(const std::filesystem::path& path);

}  // namespace transom
