// Whole files, read with errors for people.
#pragma once

#include <filesystem>
#include <string>

#include <nlohmann/json_fwd.hpp>

namespace transom {

// The content of a file. Throws Error.
std::string read_file(const std::filesystem::path& path);

// The JSON object in a file. Throws Error where it is none.
nlohmann::json read_json(const std::filesystem::path& path);

}  // namespace transom
