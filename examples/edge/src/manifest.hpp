// A bundle's manifest.json (docs/bundles.md): the contents of the bundle, and whether its files are unchanged.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace transom {

// One backend's compiled model for one target.
struct Variant {
    std::string name;
    std::string backend;
    std::string target;  // human-readable device: "Snapdragon 8 Gen 2 (hexagon_v73)"
    std::string target_arch;
    std::map<std::string, std::string> needs;  // `requires`, in the backend's own keys
    bool exact = true;                         // nothing in it is computed approximately
    int64_t context = 0;                       // tokens; 0: a graph that is not a decoder
    std::map<int64_t, int64_t> memory_at;      // context length → bytes of weights, workspace and cache
    std::map<std::string, std::string> files;  // the backend's name → path in the bundle
};

struct FileRecord {
    uint64_t bytes = 0;
    std::string blake2b;
};

struct Manifest {
    std::filesystem::path folder;
    std::string model;
    std::vector<Variant> variants;
    std::map<std::string, FileRecord> files;
    std::vector<int64_t> expected_tokens;  // ids of the fixed prompt
    std::vector<int64_t> expected_best;    // for each of them, the reference's most likely next token

    // The variant of that name. Throws Error if there is none.
    const Variant& variant(const std::string& name) const;
    // The path of a variant's file, by the backend's name for it. Throws Error if there is none.
    std::filesystem::path file(const Variant& variant, const std::string& name) const;
    // Whether the bundle has a file at its root.
    bool has(const std::string& name) const { return files.count(name) > 0; }
};

// Read the manifest; nothing else in the bundle is opened. Throws Error: unreadable, damaged, or too new.
Manifest read_manifest(const std::filesystem::path& folder);

// Compare every file with the manifest: size, hash, no missing or extra files, no links. Throws Error for the first
// that differs.
void check_files(const Manifest& manifest);

}  // namespace transom
