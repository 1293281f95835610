// Calls the runner's library for the tests: one JSON request on the standard input, one JSON answer on the output.
#include <iostream>

#include <nlohmann/json.hpp>

#include "blake2b.hpp"
#include "decoder.hpp"
#include "error.hpp"
#include "judge.hpp"
#include "qnn_description.hpp"
#include "random.hpp"
#include "sampler.hpp"
#include "stop_strings.hpp"
#include "tokenizer.hpp"

namespace {

using nlohmann::json;
using namespace transom;

json encoded(const json& request) {
    const Tokenizer tokenizer = Tokenizer::open(request.at("tokenizer").get<std::string>());
    json ids = json::array();
    for (const auto& text : request.at("texts"))
        ids.push_back(tokenizer.encode(text.get<std::string>(),
                                       {request.value("add_special", true), request.value("parse_special", true)}));
    return ids;
}

// Each list of ids as the pieces that a stream yields.
json decoded(const json& request) {
    const Tokenizer tokenizer = Tokenizer::open(request.at("tokenizer").get<std::string>());
    json texts = json::array();
    for (const auto& ids : request.at("ids")) {
        Detokenizer stream(tokenizer);
        json pieces = json::array();
        for (const auto& id : ids) pieces.push_back(stream.push(id.get<int64_t>()));
        pieces.push_back(stream.finish());
        texts.push_back(pieces);
    }
    return texts;
}

json sampled(const json& request) {
    Sampling how;
    how.temperature = request.value("temperature", 0.0);
    how.top_k = request.value("top_k", int64_t{0});
    how.top_p = request.value("top_p", 1.0);
    how.min_p = request.value("min_p", 0.0);
    how.repetition_penalty = request.value("repetition_penalty", 1.0);
    how.presence_penalty = request.value("presence_penalty", 0.0);
    how.frequency_penalty = request.value("frequency_penalty", 0.0);
    how.suppress_ids = request.value("suppress_ids", how.suppress_ids);
    how.seed = request.at("seed").get<uint64_t>();
    Sampler sampler(how, request.at("prompt").get<std::vector<int64_t>>());
    json tokens = json::array();
    for (const auto& row : request.at("logits")) tokens.push_back(sampler(row.get<std::vector<float>>()));
    return tokens;
}

json random_numbers(const json& request) {
    Random random(request.at("seed").get<uint64_t>());
    json numbers = json::array();
    for (int i = 0; i < request.at("count").get<int>(); ++i) numbers.push_back(random());
    return numbers;
}

json hashes(const json& request) {
    json out = json::array();
    for (const auto& path : request.at("paths")) out.push_back(file_hash(path.get<std::string>()));
    return out;
}

json stopped(const json& request) {
    StopStrings stops(request.at("stops").get<std::vector<std::string>>());
    std::string shown;
    for (const auto& piece : request.at("pieces")) {
        shown += stops.push(piece.get<std::string>());
        if (stops.found()) break;
    }
    const bool found = stops.found();
    return {{"shown", shown + stops.finish()}, {"found", found}};
}

json judged(const json& request) {
    const Manifest manifest = read_manifest(request.at("bundle").get<std::string>());
    json out = json::array();
    for (const auto& path : request.at("devices"))
        for (const Verdict& verdict : judge(manifest, read_device(path.get<std::string>())))
            out.push_back({verdict.variant, verdict.fits, verdict.context, verdict.reason});
    return out;
}

// Of each step [tokens, past, new ones], its inputs by name, its first position, and its first node.
json sparse_steps(const json& request) {
    const QnnDescription about = read_qnn_description(request.at("qnn_json").get<std::string>());
    json out = json::array();
    for (const auto& one : request.at("steps")) {
        const SparseStep step(about.sparse.value(), about.context, one.at(0).get<int64_t>());
        const auto past = one.at(1).get<int64_t>();
        json inputs = json::object();
        for (const auto& [name, input] : step.inputs(past, one.at(2).get<int64_t>(), about.mask_low))
            inputs[name] = {input.numbers.index() == 0 ? "float32" : "int32", input.shape,
                            std::visit([](const auto& numbers) { return json(numbers); }, input.numbers)};
        out.push_back({inputs, step.base(past), step.first_node(past)});
    }
    return out;
}

json runs(const json& request) {
    json out = json::array();
    for (const auto& one : request.at("steps"))
        out.push_back(sparse_runs(request.at("chunk").get<int64_t>(), one.at(0).get<int64_t>(), one.at(1).get<int64_t>()));
    return out;
}

// The logits after each of some steps of one text, by the uncompiled graphs of a qnn variant.
json stepped(const json& request) {
    const Manifest manifest = read_manifest(request.at("bundle").get<std::string>());
    Settings settings;
    settings.libraries.onnxruntime = request.at("onnxruntime").get<std::string>();
    settings.qnn_on_cpu = true;
    const auto decoder = open_decoder(manifest, manifest.variants.at(0), settings);
    json out = json::array();
    for (const auto& ids : request.at("steps")) out.push_back(decoder->step(ids.get<std::vector<int64_t>>()));
    return out;
}

}  // namespace

int main() {
    const std::map<std::string, json (*)(const json&)> calls = {
        {"encode", encoded}, {"decode", decoded}, {"sample", sampled}, {"random", random_numbers},
        {"hash", hashes}, {"stop", stopped}, {"judge", judged}, {"sparse_steps", sparse_steps}, {"sparse_runs", runs},
        {"step", stepped},
    };
    try {
        const json request = json::parse(std::cin);
        std::cout << calls.at(request.at("call").get<std::string>())(request).dump() << std::endl;
        return 0;
    } catch (const std::exception& error) {
        std::cerr << error.what() << std::endl;
        return 2;
    }
}
