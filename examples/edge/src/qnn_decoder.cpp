// The variant `qnn`: graphs of fixed shape for a Snapdragon's NPU, one for a chunk of a prompt and one for a single
// token. What cannot be a part of such a graph is done here: rows of the embedding are looked up, masks are made, and
// the new keys and values are written into the cache.
#include <algorithm>
#include <cstring>

#include <nlohmann/json.hpp>

#include "decoder.hpp"
#include "error.hpp"
#include "files.hpp"
#include "mapped_file.hpp"
#include "session.hpp"

namespace transom {

namespace {

constexpr int64_t qnn_version = 1;

struct Layer {
    int64_t kv_heads, head_dim, value_dim, window;  // window 0: sees all that came before
};

// qnn.json.
struct Description {
    int64_t context, chunk, vocabulary, hidden;
    std::string embedding_file;
    ONNXTensorElementDataType embedding_type, cache_type;
    float embedding_scale, mask_low;
    std::vector<Layer> layers;
    struct Part {
        std::string prefill, decode;
    };
    std::vector<Part> parts;
};

ONNXTensorElementDataType element_type(const std::string& name) {
    if (name == "uint8") return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    if (name == "uint16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16;
    if (name == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    if (name == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    throw Error("qnn.json names numbers of the type " + name + ", which this program does not know",
                "Build the program again from a newer Transom");
}

size_t element_bytes(ONNXTensorElementDataType type) {
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 ? 1 : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
}

Description read_description(const std::filesystem::path& path) {
    const nlohmann::json data = read_json(path);
    try {
        if (data.at("qnn_variant").get<int64_t>() > qnn_version)
            throw Error(path.string() + " is of a newer version than this program reads",
                        "Build the program again from a newer Transom");
        Description d;
        d.context = data.at("context").get<int64_t>();
        d.chunk = data.at("chunk").get<int64_t>();
        d.vocabulary = data.at("vocabulary").get<int64_t>();
        d.hidden = data.at("hidden").get<int64_t>();
        d.embedding_file = data.at("embedding").at("file").get<std::string>();
        d.embedding_type = element_type(data.at("embedding").at("dtype").get<std::string>());
        d.embedding_scale = data.at("embedding").at("scale").get<float>();
        d.cache_type = element_type(data.at("cache").at("dtype").get<std::string>());
        d.mask_low = data.at("mask_low").get<float>();
        for (const auto& layer : data.at("layers"))
            d.layers.push_back({layer.at("kv_heads").get<int64_t>(), layer.at("head_dim").get<int64_t>(),
                                layer.at("value_dim").get<int64_t>(), layer.at("window").get<int64_t>()});
        for (const auto& part : data.at("parts"))
            d.parts.push_back({part.at("prefill").get<std::string>(), part.at("decode").get<std::string>()});
        if (d.context < 1 || d.chunk < 1 || d.hidden < 1 || d.vocabulary < 1 || d.parts.empty())
            throw Error(path.string() + " is damaged", "Copy the bundle again from where it was made");
        return d;
    } catch (const nlohmann::json::exception&) {
        throw Error(path.string() + " is damaged", "Copy the bundle again from where it was made");
    }
}

// Keys or values of one layer, [1, heads, context, columns], in the numbers that the graphs give them in.
struct Cache {
    int64_t heads, columns;
    std::vector<char> data;

    // Write `count` rows of `fresh` [1, heads, tokens, columns] from row `at` on.
    void write(const char* fresh, int64_t tokens, int64_t count, int64_t at, int64_t context, size_t element) {
        const size_t row = static_cast<size_t>(columns) * element;
        for (int64_t head = 0; head < heads; ++head)
            std::memcpy(data.data() + static_cast<size_t>(head * context + at) * row,
                        fresh + static_cast<size_t>(head * tokens) * row, static_cast<size_t>(count) * row);
    }
};

// What a step feeds besides the caches.
struct Inputs {
    std::vector<float> hidden, mask, mask_window;
    std::vector<int32_t> positions;
    int32_t row;
};

class QnnDecoder : public Decoder {
public:
    QnnDecoder(const Manifest& manifest, const Variant& variant, const Settings& settings)
        : about_(read_description(manifest.file(variant, "qnn.json"))),
          embedding_(manifest.file(variant, about_.embedding_file),
                     static_cast<size_t>(about_.vocabulary * about_.hidden) * element_bytes(about_.embedding_type)) {
        context_ = about_.context;
        for (const Layer& layer : about_.layers) {
            for (const int64_t columns : {layer.head_dim, layer.value_dim}) {
                const auto numbers = static_cast<size_t>(layer.kv_heads * context_ * columns);
                caches_.push_back({layer.kv_heads, columns, std::vector<char>(numbers * element_bytes(about_.cache_type))});
            }
            window_ = std::max(window_, layer.window);
        }
        const size_t graphs = 2 * about_.parts.size();
        for (size_t i = 0; i < graphs; ++i) {
            const auto& part = about_.parts[i / 2];
            const std::string& name = i % 2 == 0 ? part.prefill : part.decode;
            Ort::SessionOptions options;
            if (!settings.qnn_on_cpu) {
                options = qnn_options(settings.libraries, {{"htp_performance_mode", "burst"}});
                // The prefill and the decode graph of a part have one copy of its weights, in one binary
                options.AddConfigEntry("ep.share_ep_contexts", "1");
                if (i % 2 == 1) options.AddConfigEntry("ep.stop_share_ep_contexts", "1");
            }
            sessions_.emplace_back(manifest.file(variant, name), options);
        }
    }

    void clear() override { length_ = 0; }  // what is left in the caches is masked

    std::vector<float> step(const std::vector<int64_t>& ids) override {
        std::vector<float> logits;
        for (size_t start = 0; start < ids.size();) {
            const size_t count = std::min(ids.size() - start, static_cast<size_t>(about_.chunk));
            logits = run(ids.data() + start, static_cast<int64_t>(count), start + count == ids.size());
            start += count;
        }
        return logits;
    }

private:
    // One chunk through all parts; the logits of its last token, where they are wanted.
    std::vector<float> run(const int64_t* ids, int64_t count, bool wanted) {
        const bool decode = count == 1;
        const int64_t tokens = decode ? 1 : about_.chunk;
        if (length_ + count > context_)
            throw Error("The text has more tokens than the " + std::to_string(context_) + " that the variant was compiled for",
                        "Give a shorter text, or export the model with a larger --context");
        Inputs in;
        embed(ids, count, tokens, in);
        see(count, tokens, in);
        std::vector<float> logits;
        for (size_t part = 0; part < about_.parts.size(); ++part) {
            Session& session = sessions_[2 * part + (decode ? 1 : 0)];
            const std::vector<Ort::Value> values = feed(session, tokens, in);
            const std::vector<Ort::Value> results = session.run(values);
            for (size_t i = 0; i < results.size(); ++i) take(session.outputs()[i], results[i], tokens, count, in, wanted, logits);
        }
        length_ += count;
        return logits;
    }

    // Rows of the embedding; rows that fill a chunk up stay 0.
    void embed(const int64_t* ids, int64_t count, int64_t tokens, Inputs& in) const {
        const auto width = static_cast<size_t>(about_.hidden);
        in.hidden.assign(static_cast<size_t>(tokens) * width, 0.0f);
        for (int64_t i = 0; i < count; ++i) {
            if (ids[i] < 0 || ids[i] >= about_.vocabulary)
                throw Error("The token id " + std::to_string(ids[i]) + " is not in the vocabulary of " +
                                std::to_string(about_.vocabulary),
                            "Give ids of this model's tokenizer");
            const size_t from = static_cast<size_t>(ids[i]) * width;
            float* row = in.hidden.data() + static_cast<size_t>(i) * width;
            if (about_.embedding_type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
                std::memcpy(row, embedding_.data() + 4 * from, 4 * width);
            } else {
                const auto* half = reinterpret_cast<const Ort::Float16_t*>(embedding_.data()) + from;
                for (size_t column = 0; column < width; ++column) row[column] = half[column].ToFloat();
            }
            for (size_t column = 0; column < width; ++column) row[column] *= about_.embedding_scale;
        }
    }

    // Positions and masks: a token sees what is in the cache, and of its chunk itself and what comes before it. Rows
    // that fill a chunk up come last, so that no real token sees them.
    void see(int64_t count, int64_t tokens, Inputs& in) const {
        const int64_t columns = context_ + tokens;
        in.mask.assign(static_cast<size_t>(tokens * columns), about_.mask_low);
        in.mask_window = in.mask;
        for (int64_t i = 0; i < tokens; ++i) {
            const int64_t position = length_ + i;
            in.positions.push_back(static_cast<int32_t>(std::min(position, context_ - 1)));
            float* row = in.mask.data() + i * columns;
            float* windowed = in.mask_window.data() + i * columns;
            std::fill(row, row + length_, 0.0f);
            std::fill(row + context_, row + context_ + i + 1, 0.0f);
            if (window_ == 0) continue;
            const int64_t first = std::max<int64_t>(position + 1 - window_, 0);  // the first position that is seen
            std::fill(windowed + std::min(first, length_), windowed + length_, 0.0f);
            std::fill(windowed + context_ + std::max<int64_t>(first - length_, 0), windowed + context_ + i + 1, 0.0f);
        }
        in.row = static_cast<int32_t>(count - 1);
    }

    // Values for a graph's inputs, over memory that stays where it is.
    std::vector<Ort::Value> feed(const Session& session, int64_t tokens, Inputs& in) {
        std::vector<Ort::Value> values;
        const int64_t columns = context_ + tokens;
        for (const std::string& name : session.inputs()) {
            if (name == "hidden")
                values.push_back(Session::tensor(in.hidden.data(), in.hidden.size(), {1, tokens, about_.hidden}));
            else if (name == "positions")
                values.push_back(Session::tensor(in.positions.data(), in.positions.size(), {1, tokens}));
            else if (name == "mask")
                values.push_back(Session::tensor(in.mask.data(), in.mask.size(), {1, 1, tokens, columns}));
            else if (name == "mask_window")
                values.push_back(Session::tensor(in.mask_window.data(), in.mask_window.size(), {1, 1, tokens, columns}));
            else if (name == "row")
                values.push_back(Session::tensor(&in.row, 1, {1}));
            else if (Cache* cache = cache_of(name, "past"))
                values.push_back(Session::tensor(cache->data.data(), cache->data.size(),
                                                 {1, cache->heads, context_, cache->columns}, about_.cache_type));
            else
                throw other("input", name);
        }
        return values;
    }

    // Take what a graph gave: rows for the cache, the hidden state for the next part, or logits.
    void take(const std::string& name, const Ort::Value& value, int64_t tokens, int64_t count, Inputs& in, bool wanted,
              std::vector<float>& logits) {
        if (name == "hidden_out") {
            const auto* data = value.GetTensorData<float>();
            in.hidden.assign(data, data + in.hidden.size());
        } else if (name == "logits") {
            const auto* data = value.GetTensorData<float>();
            if (wanted) logits.assign(data, data + about_.vocabulary);
        } else if (Cache* cache = cache_of(name, "new")) {
            cache->write(static_cast<const char*>(value.GetTensorRawData()), tokens, count, length_, context_,
                         element_bytes(about_.cache_type));
        } else {
            throw other("output", name);
        }
    }

    // The cache of `past_key.3` or `new_value.0`.
    Cache* cache_of(const std::string& name, const std::string& prefix) {
        for (const bool value : {false, true}) {
            const std::string start = prefix + (value ? "_value." : "_key.");
            if (name.compare(0, start.size(), start) != 0) continue;
            const std::string digits = name.substr(start.size());
            if (digits.empty() || digits.size() > 6 || digits.find_first_not_of("0123456789") != digits.npos) return nullptr;
            const size_t layer = std::stoul(digits);
            if (layer < about_.layers.size()) return &caches_[2 * layer + (value ? 1 : 0)];
        }
        return nullptr;
    }

    static Error other(const std::string& what, const std::string& name) {
        return {"A graph has the " + what + " " + name + ", which this program does not know",
                "Build the program again from the Transom that wrote the bundle"};
    }

    Description about_;
    MappedFile embedding_;
    std::vector<Cache> caches_;  // keys and values of each layer in turn
    std::vector<Session> sessions_;  // prefill and decode of each part in turn
    int64_t window_ = 0;
};

}  // namespace

std::unique_ptr<Decoder> open_qnn_decoder(const Manifest& manifest, const Variant& variant, const Settings& settings) {
    open_onnxruntime(settings.libraries);
    return std::make_unique<QnnDecoder>(manifest, variant, settings);
}

}  // namespace transom
