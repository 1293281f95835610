#include "text.hpp"

#include <vector>

#include "unicode.hpp"

namespace transom {

std::string from_java(JNIEnv* env, jstring text) {
    std::string out;
    if (text == nullptr) return out;
    std::vector<jchar> units(static_cast<size_t>(env->GetStringLength(text)));
    env->GetStringRegion(text, 0, static_cast<jsize>(units.size()), units.data());
    for (size_t i = 0; i < units.size(); ++i) {
        uint32_t character = units[i];
        const bool high = character >= 0xd800 && character < 0xdc00;
        if (high && i + 1 < units.size() && units[i + 1] >= 0xdc00 && units[i + 1] < 0xe000)
            character = 0x10000 + ((character - 0xd800) << 10) + (units[++i] - 0xdc00u);
        else if (character >= 0xd800 && character < 0xe000)
            character = 0xfffd;
        out += utf8(character);
    }
    return out;
}

jstring to_java(JNIEnv* env, const std::string& bytes) {
    Utf8Stream stream;
    std::string text = stream.push(bytes);
    text += stream.finish();
    std::vector<jchar> units;
    for (size_t at = 0; at < text.size(); at += character_bytes(text[at])) {
        const uint32_t character = first_character(std::string_view(text).substr(at));
        if (character < 0x10000) {
            units.push_back(static_cast<jchar>(character));
        } else {
            units.push_back(static_cast<jchar>(0xd800 + ((character - 0x10000) >> 10)));
            units.push_back(static_cast<jchar>(0xdc00 + ((character - 0x10000) & 0x3ff)));
        }
    }
    return env->NewString(units.data(), static_cast<jsize>(units.size()));
}

}  // namespace transom
