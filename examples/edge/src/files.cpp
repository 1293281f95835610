#include "files.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include "error.hpp"

namespace transom {

namespace {

const char* const again = "Copy the bundle again from where it was made";
constexpr size_t deepest = 100;  // nesting of objects and lists

bool is_too_deep(const std::string& text) {
    size_t depth = 0;
    bool in_text = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '"') in_text = !in_text;
        if (in_text && c == '\\') ++i;
        if (in_text) continue;
        if ((c == '{' || c == '[') && ++depth > deepest) return true;
        if ((c == '}' || c == ']') && depth > 0) --depth;
    }
    return false;
}

}  // namespace

std::string read_file(const std::filesystem::path& path) {
    errno = 0;
    std::ifstream file(path, std::ios::binary);
    if (!file || std::filesystem::is_directory(path))
        throw Error(path.string() + " cannot be read: " + (errno ? std::strerror(errno) : "it is not a file"), again);
    std::ostringstream content;
    content << file.rdbuf();
    if (file.bad()) throw Error(path.string() + " cannot be read to its end", again);
    return std::move(content).str();
}

nlohmann::json read_json(const std::filesystem::path& path) {
    nlohmann::json value = parse_json(read_file(path));
    if (!value.is_object()) throw Error(path.string() + " is damaged: it is not a JSON object", again);
    return value;
}

nlohmann::json parse_json(const std::string& text) {
    if (is_too_deep(text)) return nlohmann::json::value_t::discarded;
    return nlohmann::json::parse(text, nullptr, false);
}

int64_t whole_number(const nlohmann::json& value, int64_t low, int64_t high) {
    const bool fits = value.is_number_unsigned() ? value.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)
                                                 : value.is_number_integer();
    if (fits)
        if (const auto number = value.get<int64_t>(); number >= low && number <= high) return number;
    throw std::out_of_range("whole number");
}

}  // namespace transom
