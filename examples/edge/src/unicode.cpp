#include "unicode.hpp"


namespace transom {

namespace {

const char* const replacement = "\xef\xbf\xbd";

uint8_t byte(char c) { return static_cast<uint8_t>(c); }

struct Step {
    size_t bytes;   // read from the text
    bool whole;     // a character
    bool cut;       // the text ends inside a possible character
};

// The character, or the maximal part of one, at the start of a non-empty text (Unicode standard, table 3-7).
Step step(std::string_view text) {
    const uint8_t lead = byte(text[0]);
    if (lead < 0x80) return {1, true, false};
    const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc2 || lead > 0xf4) return {1, false, false};
    for (size_t i = 1; i < length; ++i) {
        if (i == text.size()) return {i, false, true};
        uint8_t low = 0x80, high = 0xbf;
        if (i == 1) {
            if (lead == 0xe0) low = 0xa0;
            if (lead == 0xed) high = 0x9f;
            if (lead == 0xf0) low = 0x90;
            if (lead == 0xf4) high = 0x8f;
        }
        if (byte(text[i]) < low || byte(text[i]) > high) return {i, false, false};
    }
    return {length, true, false};
}

bool is_white_space(uint32_t c) {
    return (c >= 0x9 && c <= 0xd) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

}  // namespace

size_t character_bytes(char first) {
    const uint8_t lead = byte(first);
    return lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
}

bool is_utf8(std::string_view text) {
    while (!text.empty()) {
        const Step next = step(text);
        if (!next.whole) return false;
        text.remove_prefix(next.bytes);
    }
    return true;
}

uint32_t first_character(std::string_view text) {
    const size_t bytes = character_bytes(text[0]);
    if (bytes == 1) return byte(text[0]);
    uint32_t character = byte(text[0]) & (0x7fu >> bytes);
    for (size_t i = 1; i < bytes; ++i) character = (character << 6) | (byte(text[i]) & 0x3fu);
    return character;
}

std::string utf8(uint32_t character) {
    std::string text;
    const auto add = [&text](uint32_t value) { text += static_cast<char>(value); };
    if (character < 0x80) {
        add(character);
    } else if (character < 0x800) {
        add(0xc0 | (character >> 6));
    } else if (character < 0x10000) {
        add(0xe0 | (character >> 12));
        add(0x80 | ((character >> 6) & 0x3f));
    } else {
        add(0xf0 | (character >> 18));
        add(0x80 | ((character >> 12) & 0x3f));
        add(0x80 | ((character >> 6) & 0x3f));
    }
    if (character >= 0x80) add(0x80 | (character & 0x3f));
    return text;
}

size_t white_space_at_start(std::string_view text) {
    size_t at = 0;
    while (at < text.size() && is_white_space(first_character(text.substr(at)))) at += character_bytes(text[at]);
    return at;
}

size_t white_space_at_end(std::string_view text) {
    size_t end = text.size();
    while (end > 0) {
        size_t start = end - 1;
        while (start > 0 && (byte(text[start]) & 0xc0) == 0x80) --start;
        if (!is_white_space(first_character(text.substr(start)))) break;
        end = start;
    }
    return text.size() - end;
}

std::string Utf8Stream::push(std::string_view bytes) {
    held_ += bytes;
    std::string_view rest = held_;
    std::string text;
    while (!rest.empty()) {
        const Step next = step(rest);
        if (next.cut) break;
        text += next.whole ? rest.substr(0, next.bytes) : std::string_view(replacement);
        rest.remove_prefix(next.bytes);
    }
    held_ = std::string(rest);
    return text;
}

std::string Utf8Stream::finish() {
    const bool unfinished = !held_.empty();
    held_.clear();
    return unfinished ? replacement : "";
}

}  // namespace transom
