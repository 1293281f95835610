// UTF-8, and the one property of characters that a tokenizer asks for outside its patterns.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace transom {

// How many bytes of a valid UTF-8 text the character that begins with this byte takes.
size_t character_bytes(char first);

// Whether a whole text is valid UTF-8.
bool is_utf8(std::string_view text);

// The character at the start of a valid, not empty text.
uint32_t first_character(std::string_view text);

// UTF-8 of a character.
std::string utf8(uint32_t character);

// Bytes of white space (the Unicode property White_Space) at the start and at the end of a valid text.
size_t white_space_at_start(std::string_view text);
size_t white_space_at_end(std::string_view text);

// Reads a stream of bytes as UTF-8: an unfinished character is held back, and what is none becomes U+FFFD, once for
// each maximal part of a character, as the Unicode standard recommends (chapter 3.9).
class Utf8Stream {
public:
    // The text that became certain with these bytes.
    std::string push(std::string_view bytes);
    // What was held back, as U+FFFD.
    std::string finish();

private:
    std::string held_;
};

}  // namespace transom
