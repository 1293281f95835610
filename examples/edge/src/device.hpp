// The properties of a device that decide which variant of a bundle it can run.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "onnxruntime_library.hpp"

namespace transom {

struct Device {
    std::string kind;       // "cpu", "cuda", "gpu", "npu" or "remote"
    std::string name;       // human-readable
    std::string arch;       // "aarch64", "x86_64", "hexagon_v73"
    std::string soc_model;  // QNN's number, "43"; empty: not a known Snapdragon
    std::string htp_arch;   // "73"
    bool qnn = false;       // whether ONNX Runtime can use QNN here
    std::optional<int64_t> free_bytes;  // empty: not known
};

// This device. Opens ONNX Runtime, if present, to find out whether it has QNN.
Device this_device(const Libraries& libraries);

// The first device in a file from `transom doctor --json`, or in the same format. Throws Error.
Device read_device(const std::filesystem::path& path);

}  // namespace transom
