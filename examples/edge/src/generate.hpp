// The generation loop: from a prompt to tokens, one by one, until the model ends its answer.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "decoder.hpp"
#include "defaults.hpp"
#include "tokenizer.hpp"

namespace transom {

struct Answer {
    std::vector<int64_t> ids;  // without the token that ended it
    std::string reason;        // "end", "stop" (a stop string), "length", "context" or "cancelled"
    double prompt_seconds = 0;
    double answer_seconds = 0;
};

struct Wanted {
    std::vector<int64_t> prompt;
    std::optional<int64_t> max_tokens;  // empty: until the model ends or its context is full
    Sampling sampling;
};

// Called with each token and the text that it completes, and at the end with -1 for text that was held back. Returning
// false ends the answer.
using OnToken = std::function<bool(int64_t id, const std::string& text)>;

// The decoder must be empty. `tokenizer` may be null; the text is then empty. Throws Error.
Answer generate(Decoder& decoder, const Tokenizer* tokenizer, const Defaults& defaults, const Wanted& wanted,
                const OnToken& on_token);

// The number of tokens of the manifest's fixed prompt for which decoder and reference have the same most likely next
// token. The decoder must be empty. Throws Error.
size_t agreeing(Decoder& decoder, const Manifest& manifest);

}  // namespace transom
