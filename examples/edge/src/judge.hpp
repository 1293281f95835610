// Which variants of a bundle a device can run, from the manifest alone: nothing is opened. The same rules as Transom's
// own (docs/mobile-export.md).
#pragma once

#include <string>
#include <vector>

#include "device.hpp"
#include "manifest.hpp"

namespace transom {

struct Verdict {
    std::string variant;
    bool fits;
    std::string reason;   // one human-readable sentence
    int64_t context = 0;  // the longest context in `memory.at` that fits; 0: none
};

// One verdict for each variant, in the manifest's order.
std::vector<Verdict> judge(const Manifest& manifest, const Device& device);

// Why this program cannot run a variant that fits the device; empty: it can.
std::string cannot_run(const Variant& variant, const Device& device);

// The first variant that fits and that this program can run. Throws Error with every reason if there is none.
const Variant& fitting(const Manifest& manifest, const Device& device);

}  // namespace transom
