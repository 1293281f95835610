#include "qnn_description.hpp"

#include <map>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "files.hpp"

namespace transom {

namespace {

using nlohmann::json;

constexpr int64_t dense_version = 1, sparse_version = 2;
constexpr int64_t most_tokens = int64_t{1} << 24, most_columns = int64_t{1} << 20, most_heads = int64_t{1} << 12;

void need(bool right, const char* what) {
    if (!right) throw std::out_of_range(what);
}

ONNXTensorElementDataType element_type(const json& value, const std::map<std::string, ONNXTensorElementDataType>& known) {
    const auto name = value.get<std::string>();
    if (const auto found = known.find(name); found != known.end()) return found->second;
    throw Error("qnn.json names numbers of the type " + name + ", which this program does not know there",
                "Build the program again from a newer Transom");
}

SparseRule read_rule(const json& data, const QnnDescription& d) {
    const auto count = [&data](const char* name, int64_t low, int64_t high) { return whole_number(data.at(name), low, high); };
    constexpr int64_t block = SparseStep::block;
    SparseRule rule;
    rule.unit = count("unit", 1, block);
    rule.node = count("node", 1, block);
    rule.rows = count("rows", 1, block);
    need(block % rule.unit == 0 && rule.unit % rule.node == 0 && block % rule.rows == 0, "sparse");
    need(d.context % block == 0 && d.chunk % block == 0, "chunk");
    rule.local_blocks = count("local_blocks", 0, most_tokens);
    rule.near_blocks = count("near_blocks", 1, d.context / block);
    rule.chosen = count("chosen", 1, most_tokens);
    rule.far = count("far", 1, d.context / rule.unit);
    rule.dense_below = count("dense_below", 0, INT64_MAX);
    rule.dense_by_density = data.at("dense_by_density").get<bool>();
    rule.forced = data.at("forced").get<float>();
    return rule;
}

QnnDescription read(const json& data, bool sparse) {
    QnnDescription d;
    d.context = whole_number(data.at("context"), 1, most_tokens);
    d.chunk = whole_number(data.at("chunk"), 1, most_tokens);
    d.vocabulary = whole_number(data.at("vocabulary"), 1, INT32_MAX);
    d.hidden = whole_number(data.at("hidden"), 1, most_columns);
    d.embedding_file = data.at("embedding").at("file").get<std::string>();
    d.embedding_type = element_type(data.at("embedding").at("dtype"), {{"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
                                                                       {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}});
    d.embedding_scale = data.at("embedding").at("scale").get<float>();
    d.cache_type = element_type(data.at("cache").at("dtype"), {{"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
                                                               {"uint16", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16},
                                                               {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
                                                               {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}});
    d.mask_low = data.at("mask_low").get<float>();
    for (const auto& layer : data.at("layers"))
        d.layers.push_back({whole_number(layer.at("kv_heads"), 1, most_heads), whole_number(layer.at("head_dim"), 1, most_columns),
                            whole_number(layer.at("value_dim"), 1, most_columns), whole_number(layer.at("window")), 0});
    for (const auto& part : data.at("parts"))
        d.parts.push_back({part.at("prefill").get<std::string>(), part.at("decode").get<std::string>()});
    need(!d.parts.empty(), "parts");
    if (!sparse) return d;
    d.sparse = read_rule(data.at("sparse"), d);
    const json& heads = data.at("sparse").at("heads");
    need(heads.is_array() && heads.size() == d.layers.size(), "heads");
    for (size_t i = 0; i < d.layers.size(); ++i) {
        d.layers[i].choosing = static_cast<int64_t>(heads[i].size());
        need(heads[i].is_array() && d.layers[i].choosing <= d.layers[i].kv_heads, "heads");
    }
    return d;
}

}  // namespace

size_t element_bytes(ONNXTensorElementDataType type) {
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 ? 1 : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
}

QnnDescription read_qnn_description(const std::filesystem::path& path) {
    const json data = read_json(path);
    const auto damaged = [&path] { return Error(path.string() + " is damaged", "Copy the bundle again from where it was made"); };
    try {
        const int64_t version = whole_number(data.at("qnn_variant"), dense_version);
        if (version > sparse_version)
            throw Error(path.string() + " has a newer version than this program reads",
                        "Build the program again from a newer Transom");
        return read(data, version == sparse_version);
    } catch (const json::exception&) {
        throw damaged();
    } catch (const std::out_of_range&) {
        throw damaged();
    }
}

}  // namespace transom
