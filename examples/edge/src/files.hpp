// Whole files, and the JSON in them, read with errors for people.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include <nlohmann/json_fwd.hpp>

namespace transom {

// The content of a file. Throws Error.
std::string read_file(const std::filesystem::path& path);

// The JSON object in a file. Throws Error where it is none.
nlohmann::json read_json(const std::filesystem::path& path);

// JSON of a text, discarded where it is none, or nested more deeply than any file of a bundle: what is read from it
// may be walked through, copied and printed by recursion.
nlohmann::json parse_json(const std::string& text);

// A whole number of JSON. Throws std::out_of_range for one outside of the range, and for any other value.
int64_t whole_number(const nlohmann::json& value, int64_t low = 0, int64_t high = INT64_MAX);

}  // namespace transom
