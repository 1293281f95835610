// What a device is, as far as it decides which variant of a bundle is good on it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "onnxruntime_library.hpp"

namespace transom {

struct Device {
    std::string kind;       // "cpu", "cuda", "gpu", "npu" or "remote"
    std::string name;       // for people
    std::string arch;       // "aarch64", "x86_64", "hexagon_v73"
    std::string soc_model;  // as QNN numbers it, "43"; empty: no Snapdragon that is known
    std::string htp_arch;   // "73"
    bool qnn = false;       // whether ONNX Runtime can use QNN here
    std::optional<int64_t> free_bytes;  // none: not known
};

// This device. Opens ONNX Runtime, if it is there, to ask for QNN.
Device this_device(const Libraries& libraries);

// The first device of a file that `transom doctor --json` writes, or of one made like it. Throws Error.
Device read_device(const std::filesystem::path& path);

}  // namespace transom
