#include "pre_tokenizer.hpp"

#include <algorithm>
#include <array>

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "pattern.hpp"
#include "unicode.hpp"

namespace transom {

namespace {

const char* const gpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

Error unknown(const std::string& what) {
    return {"The tokenizer has the pre-tokenizer " + what + ", which this program does not know",
            "Tokenize with another library and give the program --ids"};
}

// The parts that a split produces, by the `tokenizers` package's names for the treatment of a match.
std::vector<Span> arranged(std::vector<Span> spans, const std::string& behavior) {
    std::vector<Span> parts;
    if (behavior == "Isolated") return spans;
    if (behavior == "Removed") {
        for (const Span& span : spans)
            if (!span.match) parts.push_back(span);
        return parts;
    }
    const bool backwards = behavior == "MergedWithNext";
    if (backwards) std::reverse(spans.begin(), spans.end());
    bool before = false;  // whether the span before was a match
    for (const Span& span : spans) {
        const bool joins = behavior == "Contiguous" ? span.match == before : span.match && !before;
        if (joins && !parts.empty()) {
            parts.back().start = std::min(parts.back().start, span.start);
            parts.back().end = std::max(parts.back().end, span.end);
        } else {
            parts.push_back(span);
        }
        before = span.match;
    }
    if (backwards) std::reverse(parts.begin(), parts.end());
    return parts;
}

void split(const Word& word, const Pattern& pattern, const std::string& behavior, bool invert, std::vector<Word>& out) {
    std::vector<Span> spans = pattern.cut(word.text);
    if (invert)
        for (Span& span : spans) span.match = !span.match;
    for (const Span& part : arranged(std::move(spans), behavior))
        out.push_back({word.text.substr(part.start, part.end - part.start), word.first && part.start == 0});
}

std::array<std::string, 256> alphabet() {
    std::array<std::string, 256> characters;
    uint32_t hidden = 0x100;
    for (uint32_t byte = 0; byte < 256; ++byte) {
        const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
        characters[byte] = utf8(printable ? byte : hidden++);
    }
    return characters;
}

}  // namespace

const std::string& byte_character(unsigned char byte) {
    static const std::array<std::string, 256> characters = alphabet();
    return characters[byte];
}

PreTokenizer::PreTokenizer(const nlohmann::json& data) {
    if (!data.is_null()) add(data);
}

void PreTokenizer::add(const nlohmann::json& data) {
    const auto type = data.at("type").get<std::string>();
    if (type == "Sequence") {
        for (const auto& one : data.at("pretokenizers")) add(one);
    } else if (type == "Split") {
        const auto behavior = data.at("behavior").get<std::string>();
        const std::array<std::string, 5> known = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
        if (std::find(known.begin(), known.end(), behavior) == known.end()) throw unknown("Split, " + behavior);
        steps_.emplace_back([pattern = Pattern::from_json(data.at("pattern")), behavior, invert = data.at("invert").get<bool>()](
                                const Word& word, std::vector<Word>& out) { split(word, pattern, behavior, invert, out); });
    } else if (type == "Digits") {
        const std::string behavior = data.at("individual_digits").get<bool>() ? "Isolated" : "Contiguous";
        steps_.emplace_back([pattern = Pattern::regex(R"(\p{N})"), behavior](const Word& word, std::vector<Word>& out) {
            split(word, pattern, behavior, false, out);
        });
    } else if (type == "ByteLevel") {
        if (data.at("add_prefix_space").get<bool>())
            steps_.emplace_back([](const Word& word, std::vector<Word>& out) {
                out.push_back({word.text[0] == ' ' ? word.text : ' ' + word.text, word.first});
            });
        if (data.value("use_regex", true))
            steps_.emplace_back([pattern = Pattern::regex(gpt2)](const Word& word, std::vector<Word>& out) {
                split(word, pattern, "Isolated", false, out);
            });
        steps_.emplace_back([](const Word& word, std::vector<Word>& out) {
            Word spelled{"", word.first};
            for (const char byte : word.text) spelled.text += byte_character(static_cast<unsigned char>(byte));
            out.push_back(std::move(spelled));
        });
    } else if (type == "Metaspace") {
        const auto space = data.at("replacement").get<std::string>();
        const bool by_flag = data.value("add_prefix_space", true);
        const auto scheme = data.value("prepend_scheme", std::string(by_flag ? "always" : "never"));
        if (scheme != "always" && scheme != "first" && scheme != "never") throw unknown("Metaspace, " + scheme);
        steps_.emplace_back([space, scheme, cuts = data.value("split", true), blank = Pattern::literal(" "),
                             edge = Pattern::literal(space)](const Word& word, std::vector<Word>& out) {
            Word marked{"", word.first};
            for (const Span& span : blank.cut(word.text))
                marked.text += span.match ? space : word.text.substr(span.start, span.end - span.start);
            const bool prefixed = marked.text.compare(0, space.size(), space) == 0;
            if (!prefixed && (scheme == "always" || (scheme == "first" && word.first))) marked.text = space + marked.text;
            if (cuts)
                split(marked, edge, "MergedWithNext", false, out);
            else
                out.push_back(std::move(marked));
        });
    } else {
        throw unknown(type);
    }
}

std::vector<Word> PreTokenizer::operator()(Word text) const {
    std::vector<Word> words;
    if (!text.text.empty()) words.push_back(std::move(text));
    for (const auto& step : steps_) {
        std::vector<Word> next;
        for (const Word& word : words) step(word, next);
        words = std::move(next);
    }
    return words;
}

}  // namespace transom
