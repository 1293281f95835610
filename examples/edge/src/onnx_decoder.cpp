// The variant `onnx`: one graph with the inputs and outputs of ONNX Runtime GenAI, whose caches grow.
#include <algorithm>

#include "decoder.hpp"
#include "error.hpp"
#include "session.hpp"

namespace transom {

namespace {

constexpr size_t chunk = 256;  // tokens of one run; the logits of all of them are computed

Ort::SessionOptions cpu_options(int threads) {
    Ort::SessionOptions options;
    if (threads > 0) options.SetIntraOpNumThreads(threads);
    return options;
}

class OnnxDecoder : public Decoder {
public:
    OnnxDecoder(const Manifest& manifest, const Variant& variant, const Settings& settings)
        : session_(manifest.file(variant, "model.onnx"), cpu_options(settings.threads)) {
        context_ = variant.context;
        const auto other = [&variant](const std::string& what) {
            return Error("The model of the variant " + variant.name + " has " + what + ", which this program does not know",
                         "Export the model again, for this version of Transom");
        };
        const std::vector<std::string>& out = session_.outputs();
        if (std::count(out.begin(), out.end(), "logits") != 1) throw other("no output logits");
        logits_ = static_cast<size_t>(std::find(out.begin(), out.end(), "logits") - out.begin());
        for (const std::string& name : session_.inputs()) {
            const std::string prefix = "past_key_values";
            if (name == "input_ids" || name == "attention_mask") continue;
            if (name.compare(0, prefix.size(), prefix) != 0) throw other("an input " + name);
            const auto present = std::find(out.begin(), out.end(), "present" + name.substr(prefix.size()));
            if (present == out.end()) throw other("no output for " + name);
            std::vector<int64_t> shape = session_.shape(name);
            if (shape.size() != 4 || shape[1] <= 0 || shape[3] <= 0) throw other("a cache of a shape that is not fixed");
            shape[0] = 1;
            shape[2] = 0;
            caches_.push_back({static_cast<size_t>(present - out.begin()), shape, session_.element_type(name)});
        }
        clear();
    }

    void clear() override {
        length_ = 0;
        for (Cache& one : caches_) one.value = Session::tensor(&nothing_, 0, one.empty, one.type);
    }

    std::vector<float> step(const std::vector<int64_t>& ids) override {
        std::vector<float> logits;
        for (size_t start = 0; start < ids.size(); start += chunk)
            logits = run({ids.begin() + static_cast<std::ptrdiff_t>(start),
                          ids.begin() + static_cast<std::ptrdiff_t>(std::min(start + chunk, ids.size()))});
        return logits;
    }

private:
    struct Cache {
        size_t present;  // index of the output that returns it
        std::vector<int64_t> empty;
        ONNXTensorElementDataType type;
        Ort::Value value{nullptr};
    };

    std::vector<float> run(std::vector<int64_t> ids) {
        const auto count = static_cast<int64_t>(ids.size());
        std::vector<int64_t> mask(static_cast<size_t>(length_ + count), 1);
        std::vector<Ort::Value> values;
        auto cache = caches_.begin();
        for (const std::string& name : session_.inputs()) {
            if (name == "input_ids")
                values.push_back(Session::tensor(ids.data(), ids.size(), {1, count}));
            else if (name == "attention_mask")
                values.push_back(Session::tensor(mask.data(), mask.size(), {1, length_ + count}));
            else
                values.push_back(std::move((cache++)->value));
        }
        std::vector<Ort::Value> results = session_.run(values);
        for (Cache& one : caches_) one.value = std::move(results[one.present]);  // moved, never copied
        length_ += count;
        const Ort::Value& logits = results[logits_];
        const auto info = logits.GetTensorTypeAndShapeInfo();
        const std::vector<int64_t> shape = info.GetShape();
        if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || shape.empty() || info.GetElementCount() == 0)
            throw Error("The model's logits are not rows of float32", "Export the model again, for this version of Transom");
        const float* end = logits.GetTensorData<float>() + info.GetElementCount();
        return {end - shape.back(), end};
    }

    Session session_;
    size_t logits_;
    std::vector<Cache> caches_;  // in the order of the inputs
    char nothing_ = 0;           // target of an empty cache's pointer
};

}  // namespace

std::unique_ptr<Decoder> open_onnx_decoder(const Manifest& manifest, const Variant& variant, const Settings& settings) {
    open_onnxruntime(settings.libraries);
    return std::make_unique<OnnxDecoder>(manifest, variant, settings);
}

std::unique_ptr<Decoder> open_decoder(const Manifest& manifest, const Variant& variant, const Settings& settings) {
    if (variant.backend == "onnx") return open_onnx_decoder(manifest, variant, settings);
    if (variant.backend == "qnn") return open_qnn_decoder(manifest, variant, settings);
    throw Error("The variant " + variant.name + " uses the backend " + variant.backend + ", which this program cannot run",
                "Name another one with --variant, or export the model with --format onnx");
}

}  // namespace transom
