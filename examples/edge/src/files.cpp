#include "files.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>

#include <nlohmann/json.hpp>

#include "error.hpp"

namespace transom {

namespace {

const char* const again = "Copy the bundle again from where it was made";

}  // namespace

std::string read_file(const std::filesystem::path& path) {
    errno = 0;
    std::ifstream file(path, std::ios::binary);
    if (!file || std::filesystem::is_directory(path))
        throw Error(path.string() + " cannot be read: " + (errno ? std::strerror(errno) : "it is no file"), again);
    std::ostringstream content;
    content << file.rdbuf();
    if (file.bad()) throw Error(path.string() + " cannot be read to its end", again);
    return std::move(content).str();
}

nlohmann::json read_json(const std::filesystem::path& path) {
    nlohmann::json value = nlohmann::json::parse(read_file(path), nullptr, false);
    if (!value.is_object()) throw Error(path.string() + " is damaged: it holds no JSON object", again);
    return value;
}

}  // namespace transom
