#include "manifest.hpp"

#include <algorithm>

#include <nlohmann/json.hpp>

#include "blake2b.hpp"
#include "error.hpp"
#include "files.hpp"

namespace transom {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr int64_t manifest_version = 1;
const char* const version_key = "transom_bundle";
const char* const copy_again = "Copy it again from where it was made, or export the model again";

Error bad_manifest(const fs::path& folder) { return {"The manifest of the bundle " + folder.string() + " is damaged", copy_again}; }

// A path that stays inside the bundle.
std::string inside(const std::string& name) {
    const fs::path path(name);
    const bool climbs = std::any_of(path.begin(), path.end(), [](const fs::path& part) { return part == ".."; });
    if (name.empty() || path.is_absolute() || climbs) throw std::out_of_range(name);
    return name;
}

Variant read_variant(const json& data) {
    Variant variant;
    variant.name = inside(data.at("name").get<std::string>());
    variant.backend = data.at("backend").at("name").get<std::string>();
    const json& target = data.at("target");
    variant.target_arch = target.at("arch").get<std::string>();
    const auto name = target.value("name", std::string());
    variant.target = (name.empty() ? target.at("id").get<std::string>() : name) + " (" + variant.target_arch + ")";
    variant.needs = data.at("requires").get<std::map<std::string, std::string>>();
    variant.exact = data.at("exact").get<bool>();
    variant.context = whole_number(data.at("context"));
    if (const auto at = data.at("memory").find("at"); at != data.at("memory").end())
        for (const auto& [length, bytes] : at->items()) variant.memory_at[std::stoll(length)] = whole_number(bytes);
    if (!variant.memory_at.empty() && variant.memory_at.count(variant.context) == 0) throw std::out_of_range("memory.at");
    for (const auto& [name, path] : data.at("files").items()) variant.files[name] = inside(path.get<std::string>());
    return variant;
}

}  // namespace

const Variant& Manifest::variant(const std::string& name) const {
    std::string there;
    for (const Variant& one : variants) {
        if (one.name == name) return one;
        there += (there.empty() ? "" : ", ") + one.name;
    }
    throw Error("The bundle " + folder.string() + " has no variant " + name, "It has: " + there);
}

fs::path Manifest::file(const Variant& variant, const std::string& name) const {
    const auto found = variant.files.find(name);
    if (found == variant.files.end())
        throw Error("The variant " + variant.name + " of the bundle " + folder.string() + " has no file " + name, copy_again);
    return folder / found->second;
}

Manifest read_manifest(const fs::path& folder) {
    if (!fs::is_directory(folder))
        throw Error(folder.string() + " is not a folder", "Give the folder that transom export wrote");
    if (!fs::exists(folder / "manifest.json"))
        throw Error(folder.string() + " is not a bundle: it has no manifest.json", "Give the folder that transom export wrote");
    const json data = parse_json(read_file(folder / "manifest.json"));
    try {
        const int64_t version = whole_number(data.at(version_key), 1);
        if (version > manifest_version)
            throw Error("The bundle " + folder.string() + " has version " + std::to_string(version) +
                            ", and this program reads version " + std::to_string(manifest_version),
                        "Build the program again from a newer Transom");
        Manifest manifest;
        manifest.folder = folder;
        manifest.model = data.at("model").at("name").get<std::string>();
        for (const json& one : data.at("variants")) manifest.variants.push_back(read_variant(one));
        if (manifest.variants.empty()) throw bad_manifest(folder);
        for (const auto& [name, record] : data.at("files").items())
            manifest.files[inside(name)] = {static_cast<uint64_t>(whole_number(record.at("bytes"))),
                                            record.at("blake2b").get<std::string>()};
        for (const Variant& one : manifest.variants)
            for (const auto& [name, path] : one.files)
                if (!manifest.has(path)) throw bad_manifest(folder);
        for (const json& id : data.at("expected").at("tokens")) manifest.expected_tokens.push_back(whole_number(id));
        for (const json& id : data.at("expected").at("best")) manifest.expected_best.push_back(whole_number(id));
        if (manifest.expected_tokens.size() != manifest.expected_best.size()) throw bad_manifest(folder);
        return manifest;
    } catch (const json::exception&) {
        throw bad_manifest(folder);
    } catch (const std::logic_error&) {  // an invalid number or path
        throw bad_manifest(folder);
    }
}

void check_files(const Manifest& manifest) {
    const auto wrong = [&manifest](const std::string& name, const std::string& how) {
        return Error("The bundle " + manifest.folder.string() + " is damaged: " + name + " " + how, copy_again);
    };
    for (const auto& entry : fs::recursive_directory_iterator(manifest.folder)) {
        const std::string name = entry.path().lexically_relative(manifest.folder).generic_string();
        if (entry.is_symlink()) throw wrong(name, "is a link");
        if (!entry.is_directory() && name != "manifest.json" && !manifest.has(name))
            throw wrong(name, "is not in the manifest");
    }
    for (const auto& [name, record] : manifest.files) {
        const fs::path path = manifest.folder / name;
        if (!fs::is_regular_file(path)) throw wrong(name, "is missing");
        const uint64_t bytes = fs::file_size(path);
        if (bytes != record.bytes)
            throw wrong(name, "has " + std::to_string(bytes) + " bytes, not " + std::to_string(record.bytes));
    }
    for (const auto& [name, record] : manifest.files)
        if (file_hash(manifest.folder / name) != record.blake2b) throw wrong(name, "was altered");
}

}  // namespace transom
