#include "defaults.hpp"

#include <limits>
#include <stdexcept>

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
    const bool own = sample.value_or(true);  // `do_sample: false` cancels the model's own sampling values
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
    // The value, or null
    const auto there = [&data](const char* name) {
        const auto found = data.find(name);
        return found == data.end() || found->is_null() ? nullptr : &*found;
    };
    const auto ids = [&](const char* name, std::vector<int64_t>& into) {
        if (const auto* list = there(name))
            for (const auto& id : *list) into.push_back(whole_number(id));
    };
    const auto count = [&](const char* name, std::optional<int64_t>& into, int64_t low) {
        if (const auto* value = there(name))
            if (const int64_t given = whole_number(*value, INT64_MIN); given >= low) into = given;
    };
    const auto number = [&](const char* name, std::optional<double>& into, double low, double high) {
        if (const auto* value = there(name))
            if (const auto given = value->get<double>(); given >= low && given <= high) into = given;
    };
    constexpr double above_zero = std::numeric_limits<double>::min();
    const auto damaged = [&path] { return Error(path.string() + " is damaged", "Copy the bundle again from where it was made"); };
    try {
        ids("eos_ids", defaults.eos_ids);
        ids("suppress_ids", defaults.suppress_ids);
        if (const auto* list = there("stop"))
            for (const auto& stop : *list)
                if (auto text = stop.get<std::string>(); !text.empty()) defaults.stop.push_back(std::move(text));
        if (const auto* sample = there("sample")) defaults.sample = sample->get<bool>();
        count("max_new_tokens", defaults.max_new_tokens, 1);
        count("top_k", defaults.top_k, 0);
        number("temperature", defaults.temperature, 0, 100);
        number("top_p", defaults.top_p, above_zero, 1);
        number("min_p", defaults.min_p, 0, 1);
        number("repetition_penalty", defaults.repetition_penalty, above_zero, 100);
        number("presence_penalty", defaults.presence_penalty, -2, 2);
        number("frequency_penalty", defaults.frequency_penalty, -2, 2);
    } catch (const nlohmann::json::exception&) {
        throw damaged();
    } catch (const std::out_of_range&) {
        throw damaged();
    }
    return defaults;
}

}  // namespace transom
