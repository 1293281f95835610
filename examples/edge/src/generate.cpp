#include "generate.hpp"

#include <algorithm>
#include <chrono>

#include "error.hpp"
#include "sampler.hpp"
#include "stop_strings.hpp"

namespace transom {

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Answer generate(Decoder& decoder, const Tokenizer* tokenizer, const Defaults& defaults, const Wanted& wanted,
                const OnToken& on_token) {
    if (wanted.prompt.empty()) throw Error("The prompt has no tokens", "Give a longer --prompt, or --ids");
    const auto length = static_cast<int64_t>(wanted.prompt.size());
    const int64_t room = decoder.context() - length;
    if (decoder.context() > 0 && room < 1)
        throw Error("The prompt has " + std::to_string(length) + " tokens, and the context holds " +
                        std::to_string(decoder.context()),
                    "Give a shorter prompt");
    int64_t most = wanted.max_tokens.value_or(defaults.max_new_tokens.value_or(INT64_MAX));
    const bool bounded = decoder.context() > 0 && room < most;
    if (bounded) most = room;
    Sampler sampler(wanted.sampling, wanted.prompt);
    std::optional<Detokenizer> text;
    if (tokenizer != nullptr) text.emplace(*tokenizer);
    StopStrings stops(defaults.stop);
    Answer answer;
    answer.reason = bounded ? "context" : "length";
    auto start = std::chrono::steady_clock::now();
    std::vector<float> logits = decoder.step(wanted.prompt);
    answer.prompt_seconds = seconds_since(start);
    start = std::chrono::steady_clock::now();
    while (true) {
        const int64_t id = sampler(std::move(logits));
        if (std::find(defaults.eos_ids.begin(), defaults.eos_ids.end(), id) != defaults.eos_ids.end()) {
            answer.reason = "end";
            break;
        }
        answer.ids.push_back(id);
        if (!on_token(id, text ? stops.push(text->push(id)) : "")) {
            answer.reason = "cancelled";
            break;
        }
        if (stops.found()) {
            answer.reason = "stop";
            break;
        }
        if (static_cast<int64_t>(answer.ids.size()) >= most) break;
        logits = decoder.step({id});
    }
    answer.answer_seconds = seconds_since(start);
    if (text && !stops.found()) {
        std::string rest = stops.push(text->finish());
        rest += stops.finish();
        if (!rest.empty() && answer.reason != "cancelled") on_token(-1, rest);
    }
    return answer;
}

size_t agreeing(Decoder& decoder, const Manifest& manifest) {
    size_t count = 0;
    for (size_t i = 0; i < manifest.expected_tokens.size(); ++i) {
        const std::vector<float> logits = decoder.step({manifest.expected_tokens[i]});
        const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
        if (best == manifest.expected_best[i]) ++count;
    }
    return count;
}

}  // namespace transom
