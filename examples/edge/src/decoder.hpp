// A decoder with its cache: from token ids to the logits of the next token.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "manifest.hpp"
#include "onnxruntime_library.hpp"

namespace transom {

class Decoder {
public:
    virtual ~Decoder() = default;

    // Append at least one token to the text; returns the logits [vocabulary] after the last one. Throws Error; the
    // decoder must then be cleared before further use.
    virtual std::vector<float> step(const std::vector<int64_t>& ids) = 0;

    // Forget all tokens.
    virtual void clear() = 0;

    int64_t length() const { return length_; }    // tokens in the cache
    int64_t context() const { return context_; }  // most tokens that the cache holds

protected:
    int64_t length_ = 0;
    int64_t context_ = 0;
};

struct Settings {
    Libraries libraries;
    int threads = 0;         // CPU threads; 0: ONNX Runtime chooses
    bool qnn_on_cpu = false;  // run a qnn variant's graphs on the CPU; they must be plain ONNX, not compiled
};

// Open a variant's model. Throws Error.
std::unique_ptr<Decoder> open_decoder(const Manifest& manifest, const Variant& variant, const Settings& settings);

std::unique_ptr<Decoder> open_onnx_decoder(const Manifest& manifest, const Variant& variant, const Settings& settings);
std::unique_ptr<Decoder> open_qnn_decoder(const Manifest& manifest, const Variant& variant, const Settings& settings);

}  // namespace transom
