// The variant `qnn`: graphs of fixed shape for a Snapdragon's NPU, one for a chunk of a prompt and one for a single
// token. This file does what such a graph cannot: it looks up rows of the embedding, builds masks, and writes the new
// keys and values into the cache, and with sparse attention the nodes of the keys.
#include <algorithm>
#include <cstring>
#include <map>

#include "decoder.hpp"
#include "error.hpp"
#include "mapped_file.hpp"
#include "qnn_description.hpp"
#include "session.hpp"
#include "sparse_inputs.hpp"

namespace transom {

namespace {

// A part of the cache of one layer, [1, heads, rows, columns], in the element type of the graphs.
struct Cache {
    int64_t heads, rows, columns;
    ONNXTensorElementDataType type;
    bool nodes;  // its rows are nodes, not tokens
    std::vector<char> data;

    std::vector<int64_t> shape() const { return {1, heads, rows, columns}; }
    size_t row_bytes() const { return static_cast<size_t>(columns) * element_bytes(type); }
    // Masked values are multiplied by 0, so they must be finite.
    void make() { data.assign(static_cast<size_t>(heads * rows) * row_bytes(), 0); }
    // Write `count` rows of `fresh` [1, heads, tokens, columns], starting with row `from`, at row `at`.
    void write(const char* fresh, int64_t tokens, int64_t from, int64_t count, int64_t at) {
        for (int64_t head = 0; head < heads; ++head)
            std::memcpy(data.data() + static_cast<size_t>(head * rows + at) * row_bytes(),
                        fresh + static_cast<size_t>(head * tokens + from) * row_bytes(),
                        static_cast<size_t>(count) * row_bytes());
    }
};

// One run of the graphs: `count` new tokens in rows `from` and later of `tokens` rows; row 0 has position `base`.
struct Run {
    const int64_t* ids;
    int64_t count, tokens, base, from;
};

// The inputs of a run other than the caches.
struct Inputs {
    std::vector<float> hidden, mask, mask_window;
    std::vector<int32_t> positions;
    int32_t row;
    std::map<std::string, SparseInput> sparse;
};

class QnnDecoder : public Decoder {
public:
    QnnDecoder(const Manifest& manifest, const Variant& variant, const Settings& settings)
        : about_(read_qnn_description(manifest.file(variant, "qnn.json"))),
          embedding_(manifest.file(variant, about_.embedding_file),
                     static_cast<size_t>(about_.vocabulary * about_.hidden) * element_bytes(about_.embedding_type)) {
        context_ = about_.context;
        for (size_t i = 0; i < about_.layers.size(); ++i) add_caches(about_.layers[i], std::to_string(i));
        const size_t graphs = 2 * about_.parts.size();
        for (size_t i = 0; i < graphs; ++i) {
            const auto& part = about_.parts[i / 2];
            const std::string& name = i % 2 == 0 ? part.prefill : part.decode;
            Ort::SessionOptions options;
            if (!settings.qnn_on_cpu) {
                options = qnn_options(settings.libraries, {{"htp_performance_mode", "burst"}});
                // The prefill and decode graphs of a part share one copy of its weights, in one binary
                options.AddConfigEntry("ep.share_ep_contexts", "1");
                if (i % 2 == 1) options.AddConfigEntry("ep.stop_share_ep_contexts", "1");
            }
            sessions_.emplace_back(manifest.file(variant, name), options);
            for (const std::string& input : sessions_.back().inputs())
                if (const Cache* cache = cache_of(input); cache && sessions_.back().shape(input) != cache->shape())
                    throw Error("The graph " + name + " and qnn.json differ in the shape of " + input,
                                "Compare the bundle with its manifest by --check");
        }
        for (auto& [name, cache] : caches_) cache.make();  // not earlier: the graphs must confirm the sizes
    }

    void clear() override { length_ = 0; }  // old values in the caches are masked

    std::vector<float> step(const std::vector<int64_t>& ids) override {
        std::vector<float> logits;
        const int64_t all = static_cast<int64_t>(ids.size());
        for (int64_t start = 0; start < all;) {
            const int64_t count = std::min(all - start, about_.chunk);
            const auto runs = about_.sparse ? sparse_runs(about_.chunk, length_, count) : std::vector<int64_t>{count};
            for (const int64_t size : runs) {
                logits = run(ids.data() + start, size);
                start += size;
            }
        }
        return logits;
    }

private:
    void add_caches(const QnnDescription::Layer& layer, const std::string& number) {
        const auto type = about_.cache_type;
        caches_["key." + number] = {layer.kv_heads, context_, layer.head_dim, type, false, {}};
        caches_["value." + number] = {layer.kv_heads, context_, layer.value_dim, type, false, {}};
        window_ = std::max(window_, layer.window);
        if (layer.choosing == 0) return;
        const int64_t nodes = context_ / about_.sparse->node;
        caches_["mean." + number] = {layer.choosing, nodes, layer.head_dim, type, true, {}};
        caches_["variance." + number] = {layer.choosing, nodes, layer.head_dim, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, true, {}};
    }

    // Run one token, or up to a chunk, through all parts; returns the logits of the last token.
    std::vector<float> run(const int64_t* ids, int64_t count) {
        if (length_ + count > context_)
            throw Error("The text has more tokens than the " + std::to_string(context_) + " that the variant was compiled for",
                        "Give a shorter text, or export the model with a larger --context");
        Run run{ids, count, count == 1 ? 1 : about_.chunk, length_, 0};
        Inputs in;
        if (about_.sparse) {
            const SparseStep step(*about_.sparse, context_, run.tokens);
            run.base = step.base(length_);
            run.from = length_ - run.base;
            in.sparse = step.inputs(length_, count, about_.mask_low);
        }
        embed(run, in);
        see(run, in);
        std::vector<float> logits;
        for (size_t part = 0; part < about_.parts.size(); ++part) {
            Session& session = sessions_[2 * part + (run.tokens == 1 ? 1 : 0)];
            const std::vector<Ort::Value> values = feed(session, run, in);
            const std::vector<Ort::Value> results = session.run(values);
            for (size_t i = 0; i < results.size(); ++i) take(session.outputs()[i], results[i], run, in, logits);
        }
        if (logits.empty()) throw Error("No graph gives logits", "Compare the bundle with its manifest by --check");
        length_ += count;
        return logits;
    }

    // Rows of the embedding; rows of padding stay 0.
    void embed(const Run& run, Inputs& in) const {
        const auto width = static_cast<size_t>(about_.hidden);
        in.hidden.assign(static_cast<size_t>(run.tokens) * width, 0.0f);
        for (int64_t i = 0; i < run.count; ++i) {
            const int64_t id = run.ids[i];
            if (id < 0 || id >= about_.vocabulary)
                throw Error("The token id " + std::to_string(id) + " is not in the vocabulary of " +
                                std::to_string(about_.vocabulary),
                            "Give ids of this model's tokenizer");
            const size_t from = static_cast<size_t>(id) * width;
            float* row = in.hidden.data() + static_cast<size_t>(run.from + i) * width;
            if (about_.embedding_type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
                std::memcpy(row, embedding_.data() + 4 * from, 4 * width);
            } else {
                const auto* half = reinterpret_cast<const Ort::Float16_t*>(embedding_.data()) + from;
                for (size_t column = 0; column < width; ++column) row[column] = half[column].ToFloat();
            }
            for (size_t column = 0; column < width; ++column) row[column] *= about_.embedding_scale;
        }
    }

    // Positions and masks: a token sees the cache, itself, and the tokens before it in its run. No real token sees rows
    // of padding: those before the tokens are masked, and those after them come later.
    void see(const Run& run, Inputs& in) const {
        const int64_t columns = context_ + run.tokens;
        in.mask.assign(static_cast<size_t>(run.tokens * columns), about_.mask_low);
        if (window_ > 0) in.mask_window = in.mask;
        for (int64_t i = 0; i < run.tokens; ++i) {
            const int64_t position = run.base + i;
            in.positions.push_back(static_cast<int32_t>(std::min(position, context_ - 1)));
            const auto show = [&](std::vector<float>& mask, int64_t first) {  // the positions from `first` on
                float* row = mask.data() + i * columns;
                for (int64_t at = first; at < std::min(position + 1, length_); ++at) row[at] = 0;
                for (int64_t at = std::max(first, length_); at <= position; ++at) row[context_ + at - run.base] = 0;
            };
            show(in.mask, 0);
            if (window_ > 0) show(in.mask_window, std::max<int64_t>(position + 1 - window_, 0));
        }
        in.row = static_cast<int32_t>(run.from + run.count - 1);
    }

    // Values for a graph's inputs, over memory that does not move.
    std::vector<Ort::Value> feed(const Session& session, const Run& run, Inputs& in) {
        std::vector<Ort::Value> values;
        const auto add = [&values](auto& numbers, const std::vector<int64_t>& shape) {
            values.push_back(Session::tensor(numbers.data(), numbers.size(), shape));
        };
        const int64_t tokens = run.tokens, columns = context_ + tokens;
        for (const std::string& name : session.inputs()) {
            if (name == "hidden")
                add(in.hidden, {1, tokens, about_.hidden});
            else if (name == "positions")
                add(in.positions, {1, tokens});
            else if (name == "mask")
                add(in.mask, {1, 1, tokens, columns});
            else if (name == "mask_window" && window_ > 0)
                add(in.mask_window, {1, 1, tokens, columns});
            else if (name == "row")
                values.push_back(Session::tensor(&in.row, 1, {1}));
            else if (const auto sparse = in.sparse.find(name); sparse != in.sparse.end())
                std::visit([&](auto& numbers) { add(numbers, sparse->second.shape); }, sparse->second.numbers);
            else if (Cache* cache = cache_of(name))
                values.push_back(Session::tensor(cache->data.data(), cache->data.size(), cache->shape(), cache->type));
            else
                throw other("input", name);
        }
        return values;
    }

    // Store a graph's outputs: rows for the cache, the hidden state for the next part, or logits.
    void take(const std::string& name, const Ort::Value& value, const Run& run, Inputs& in, std::vector<float>& logits) {
        const auto numbers = [&](size_t count, ONNXTensorElementDataType type) {
            const auto info = value.GetTensorTypeAndShapeInfo();
            if (info.GetElementType() != type || info.GetElementCount() != count)
                throw Error("A graph gives " + name + " in another form than qnn.json says",
                            "Compare the bundle with its manifest by --check");
            return static_cast<const char*>(value.GetTensorRawData());
        };
        const auto floats = [&](size_t count) {
            return reinterpret_cast<const float*>(numbers(count, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
        };
        if (name == "hidden_out") {
            const float* data = floats(in.hidden.size());
            in.hidden.assign(data, data + in.hidden.size());
        } else if (name == "logits") {
            const float* data = floats(static_cast<size_t>(about_.vocabulary));
            logits.assign(data, data + about_.vocabulary);
        } else if (Cache* cache = cache_of(name)) {
            int64_t rows = run.tokens, from = run.from, count = run.count, at = length_;
            if (cache->nodes) {
                const SparseStep step(*about_.sparse, context_, run.tokens);
                rows = step.renewed_nodes();
                from = 0;
                at = step.first_node(length_);
                count = std::min(rows, cache->rows - at);
            }
            const auto whole = static_cast<size_t>(cache->heads * rows * cache->columns);
            cache->write(numbers(whole, cache->type), rows, from, count, at);
        } else {
            throw other("output", name);
        }
    }

    // The cache of `past_key.3` or `new_key.3`; null for any other name.
    Cache* cache_of(const std::string& name) {
        const size_t start = name.find('_') + 1;
        const std::string prefix = name.substr(0, start);
        const auto found = prefix == "past_" || prefix == "new_" ? caches_.find(name.substr(start)) : caches_.end();
        return found == caches_.end() ? nullptr : &found->second;
    }

    static Error other(const std::string& what, const std::string& name) {
        return {"A graph has the " + what + " " + name + ", which this program does not know",
                "Build the program again from the Transom that wrote the bundle"};
    }

    QnnDescription about_;
    MappedFile embedding_;
    std::map<std::string, Cache> caches_;  // by "key.3", "value.3", and with sparse attention "mean.3", "variance.3"
    std::vector<Session> sessions_;        // prefill and decode of each part in turn
    int64_t window_ = 0;
};

}  // namespace

std::unique_ptr<Decoder> open_qnn_decoder(const Manifest& manifest, const Variant& variant, const Settings& settings) {
    open_onnxruntime(settings.libraries);
    return std::make_unique<QnnDecoder>(manifest, variant, settings);
}

}  // namespace transom
