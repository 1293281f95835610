#include "pattern.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "unicode.hpp"

namespace transom {

namespace {

const char* const other_tokenizer = "Tokenize with another library and give the program --ids";

// The expression in PCRE2's syntax. White space is spelled out, because PCRE2's \s also matches U+180E.
std::string translated(const std::string& expression) {
    const auto refused = [&expression](const std::string& what) {
        return Error("The tokenizer's pattern " + expression + " has " + what + ", which this program does not know",
                     other_tokenizer);
    };
    std::string out;
    bool in_class = false;
    for (size_t i = 0; i < expression.size(); ++i) {
        const char c = expression[i];
        const char next = i + 1 < expression.size() ? expression[i + 1] : '\0';
        if (c == '\\') {
            if (next == '\0') throw refused("a lone \\ at its end");
            ++i;
            if (next == 's') {
                out += "\\p{White_Space}";
            } else if (next == 'S') {
                out += "\\P{White_Space}";
            } else if ((next >= 'a' && next <= 'z') || (next >= 'A' && next <= 'Z') || (next >= '0' && next <= '9')) {
                if (std::string_view("pPdDnrtfx").find(next) == std::string_view::npos)
                    throw refused(std::string("\\") + next);
                out += {c, next};
                if (i + 1 < expression.size() && expression[i + 1] == '{') {  // a property's name
                    const size_t end = std::min(expression.find('}', i), expression.size() - 1);
                    out += expression.substr(i + 1, end - i);
                    i = end;
                }
            } else {
                out += {c, next};
            }
            continue;
        }
        if (in_class) {
            if (c == '[') throw refused("a class within a class");
            if (c == '&' && next == '&') throw refused("an intersection of classes");
            if (c == ']') in_class = false;
        } else if (c == '[') {
            in_class = true;
            if (next == ']' || (next == '^' && i + 2 < expression.size() && expression[i + 2] == ']'))
                throw refused("an empty class");
        } else if (c == '}' && next == '+') {
            throw refused("}+");  // possessive in PCRE2, a repeated repetition in Oniguruma
        }
        out += c;
    }
    return out;
}

}  // namespace

struct Pattern::Compiled {
    explicit Compiled(const std::string& expression) {
        const std::string text = translated(expression);
        int number = 0;
        PCRE2_SIZE place = 0;
        // Like Oniguruma's Ruby syntax: Unicode everywhere, ^ and $ match at every line, and only \n ends a line
        const std::unique_ptr<pcre2_compile_context, void (*)(pcre2_compile_context*)> context(
            pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
        pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
        code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                             PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &number, &place, context.get());
        if (code == nullptr) {
            PCRE2_UCHAR said[256];
            pcre2_get_error_message(number, said, sizeof said);
            throw Error("The tokenizer's pattern " + expression + " cannot be compiled: " +
                            reinterpret_cast<const char*>(said),
                        other_tokenizer);
        }
    }
    Compiled(const Compiled&) = delete;
    Compiled& operator=(const Compiled&) = delete;
    ~Compiled() { pcre2_code_free(code); }

    pcre2_code* code;
};

Pattern Pattern::regex(const std::string& expression) {
    Pattern pattern;
    pattern.compiled_ = std::make_shared<const Compiled>(expression);
    return pattern;
}

Pattern Pattern::literal(const std::string& text) {
    if (text.empty()) throw Error("The tokenizer has an empty pattern", other_tokenizer);
    Pattern pattern;
    pattern.literal_ = text;
    return pattern;
}

Pattern Pattern::from_json(const nlohmann::json& data) {
    if (data.is_object() && data.size() == 1) {
        if (data.contains("Regex")) return regex(data["Regex"].get<std::string>());
        if (data.contains("String")) return literal(data["String"].get<std::string>());
    }
    throw Error("The tokenizer has a pattern of an unknown kind: " + data.dump(), other_tokenizer);
}

std::vector<Span> Pattern::cut(std::string_view text) const {
    std::vector<Span> spans;
    size_t done = 0;
    const auto matched = [&](size_t start, size_t end) {
        if (start > done) spans.push_back({done, start, false});
        if (end > start) spans.push_back({start, end, true});
        done = end;
    };
    if (!literal_.empty()) {
        for (size_t at = text.find(literal_); at != text.npos; at = text.find(literal_, done))
            matched(at, at + literal_.size());
    } else {
        const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> data(
            pcre2_match_data_create_from_pattern(compiled_->code, nullptr), pcre2_match_data_free);
        const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
        for (size_t from = 0; from <= text.size();) {
            const int found =
                pcre2_match(compiled_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK, data.get(), nullptr);
            if (found == PCRE2_ERROR_NOMATCH) break;
            if (found < 0) {
                PCRE2_UCHAR said[256];
                pcre2_get_error_message(found, said, sizeof said);
                throw Error(std::string("A pattern of the tokenizer fails on this text: ") +
                                reinterpret_cast<const char*>(said),
                            "Give a shorter text");
            }
            const PCRE2_SIZE* place = pcre2_get_ovector_pointer(data.get());
            const size_t start = place[0], end = place[1];
            if (end > start) matched(start, end);
            from = end > start ? end : end < text.size() ? end + character_bytes(text[end]) : end + 1;
        }
    }
    if (done < text.size()) spans.push_back({done, text.size(), false});
    return spans;
}

}  // namespace transom
