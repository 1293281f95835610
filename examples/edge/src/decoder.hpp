// A decoder with its cache: token ids go in, the logits of what comes after them come out.
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

    // Append tokens, one at least, to the text so far; the logits [vocabulary] after the last of them. Throws Error;
    // the decoder is then of no more use until it is cleared.
    virtual std::vector<float> step(const std::vector<int64_t>& ids) = 0;

    // Forget all tokens.
    virtual void clear() = 0;

    int64_t length() const { return length_; }    // tokens in the cache
    int64_t context() const { return context_; }  // tokens that it holds at most

protected:
    int64_t length_ = 0;
    int64_t context_ = 0;
};

struct Settings {
    Libraries libraries;
    int threads = 0;         // of the CPU; 0: as ONNX Runtime chooses
    bool qnn_on_cpu = false;  // run the graphs of a qnn variant on the CPU: they must be plain ONNX, not compiled
};

// Open a variant's model. Throws Error.
std::unique_ptr<Decoder> open_decoder(const Manifest& manifest, const Variant& variant, const Settings& settings);

std::unique_ptr<Decoder> open_onnx_decoder(const Manifest& manifest, const Variant& variant, const Settings& settings);
std::unique_ptr<Decoder> open_qnn_decoder(const Manifest& manifest, const Variant& variant, const Settings& settings);

}  // namespace transom
