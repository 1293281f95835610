// Reads whole files and the JSON in them, with human-readable errors.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include <nlohmann/json_fwd.hpp>

namespace transom {

// The content of a file. Throws Error.
std::string read_file(const std::filesystem::path& path);

// The JSON object in a file. Throws Error for anything else.
nlohmann::json read_json(const std::filesystem::path& path);

// JSON of a text. Discarded if it is not JSON, or nested more deeply than any file of a bundle, so that the result can
// safely be walked, copied and printed recursively.
nlohmann::json parse_json(const std::string& text);

// A JSON integer. Throws std::out_of_range for a number outside the range, and for any other value.
int64_t whole_number(const nlohmann::json& value, int64_t low = 0, int64_t high = INT64_MAX);

}  // namespace transom
