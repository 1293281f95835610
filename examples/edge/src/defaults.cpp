#include "defaults.hpp"

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "files.hpp"

namespace transom {

Sampling Defaults::sampling(const Asked& asked) const {
    const auto range = [](const char* name, double value, double low, double high) {
        if (!(value >= low && value <= high))
            throw Error(std::string(name) + " is " + std::to_string(value),
                        "Give a number from " + std::to_string(low) + " to " + std::to_string(high));
    };
    if (asked.temperature) range("--temperature", *asked.temperature, 0, 100);
    if (asked.top_p) range("--top-p", *asked.top_p, 1e-6, 1);
    if (asked.top_k) range("--top-k", static_cast<double>(*asked.top_k), 0, 1e9);
    const bool own = sample.value_or(true);  // `do_sample: false` takes the model's own sampling values back
    Sampling result;
    const bool named = asked.top_k.value_or(0) > 0 || asked.top_p.value_or(1) < 1;
    const double otherwise = sample.value_or(false) || named ? 1 : 0;
    result.temperature = asked.temperature ? *asked.temperature : own && temperature ? *temperature : otherwise;
    result.top_k = asked.top_k.value_or(own ? top_k.value_or(0) : 0);
    result.top_p = asked.top_p.value_or(own ? top_p.value_or(1) : 1);
    result.min_p = own ? min_p.value_or(0) : 0;
    result.repetition_penalty = repetition_penalty.value_or(1);
    result.presence_penalty = presence_penalty.value_or(0);
    result.frequency_penalty = frequency_penalty.value_or(0);
    result.suppress_ids = suppress_ids;
    result.seed = asked.seed;
    return result;
}

Defaults read_defaults(const std::filesystem::path& path) {
    const nlohmann::json data = read_json(path);
    Defaults defaults;
    const auto read = [&data](const char* name, auto& into) {
        using Value = std::decay_t<decltype(*into)>;
        if (const auto found = data.find(name); found != data.end() && !found->is_null()) into = found->get<Value>();
    };
    try {
        defaults.eos_ids = data.value("eos_ids", defaults.eos_ids);
        defaults.stop = data.value("stop", defaults.stop);
        defaults.suppress_ids = data.value("suppress_ids", defaults.suppress_ids);
        read("max_new_tokens", defaults.max_new_tokens);
        read("sample", defaults.sample);
        read("temperature", defaults.temperature);
        read("top_k", defaults.top_k);
        read("top_p", defaults.top_p);
        read("min_p", defaults.min_p);
        read("repetition_penalty", defaults.repetition_penalty);
        read("presence_penalty", defaults.presence_penalty);
        read("frequency_penalty", defaults.frequency_penalty);
    } catch (const nlohmann::json::exception&) {
        throw Error(path.string() + " is damaged", "Copy the bundle again from where it was made");
    }
    return defaults;
}

}  // namespace transom
