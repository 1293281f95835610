// UTF-8, and the one character property that a tokenizer needs outside its patterns.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace transom {

// The bytes of the character that begins with this byte, in valid UTF-8.
size_t character_bytes(char first);

// Whether a whole text is valid UTF-8.
bool is_utf8(std::string_view text);

// The character at the start of a valid, non-empty text.
uint32_t first_character(std::string_view text);

// UTF-8 of a character.
std::string utf8(uint32_t character);

// Bytes of white space (the Unicode property White_Space) at the start and at the end of a valid text.
size_t white_space_at_start(std::string_view text);
size_t white_space_at_end(std::string_view text);

// Reads a stream of bytes as UTF-8. An unfinished character is held back. Invalid bytes become U+FFFD, one for each
// maximal part of a character, as the Unicode standard recommends (chapter 3.9).
class Utf8Stream {
public:
    // The text that these bytes complete.
    std::string push(std::string_view bytes);
    // The bytes held back, as U+FFFD.
    std::string finish();

private:
    std::string held_;
};

}  // namespace transom
