// The content of a variant's qnn.json: sizes, caches, files (docs/mobile-export.md).
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
        int64_t window;    // tokens that a query sees, including itself; 0: all
        int64_t choosing;  // KV heads with sparse attention; 0: dense attention
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

// Every number in the result is small enough that a product of four fits into 63 bits. Throws Error.
QnnDescription read_qnn_description(const std::filesystem::path& path);

}  // namespace transom
