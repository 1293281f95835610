#include "judge.hpp"

#include <cstdio>

#include "error.hpp"

namespace transom {

namespace {

// Human-readable bytes: "1.5 GB", "320 MB" (powers of ten).
std::string size(int64_t bytes) {
    auto value = static_cast<double>(bytes);
    char text[32];
    for (const char* unit : {"B", "KB", "MB"}) {
        std::snprintf(text, sizeof text, "%.0f %s", value, unit);
        if (value < 1000) return text;
        value /= 1000;
    }
    std::snprintf(text, sizeof text, "%.1f GB", value);
    return text;
}

std::string value(const std::map<std::string, std::string>& texts, const char* key) {
    const auto found = texts.find(key);
    return found == texts.end() ? "" : found->second;
}

// A CPU, or a system on a chip, which has one.
bool has_cpu(const Device& device) {
    return device.kind == "cpu" || device.arch == "aarch64" || device.arch == "x86_64" || device.arch.rfind("hexagon_", 0) == 0;
}

// Why a variant is for other hardware; empty if it is for this.
std::string wrong_device(const Variant& variant, const Device& device) {
    if (variant.backend == "onnx") return has_cpu(device) ? "" : "Runs on a CPU, and " + device.name + " has none";
    const std::string made_for = "Is made for " + variant.target + ", and " + device.name;
    if (variant.backend == "qnn") {
        const std::string soc = value(variant.needs, "soc_model"), htp = value(variant.needs, "htp_arch");
        if (soc == device.soc_model && htp == device.htp_arch) return "";
        if (device.soc_model.empty() && device.htp_arch.empty()) return made_for + " is not a known Snapdragon";
        return made_for + " has soc_model " + device.soc_model + " and htp_arch " + device.htp_arch + ", not " + soc + " and " + htp;
    }
    return variant.target_arch == device.arch ? "" : made_for + " has another architecture";
}

Verdict verdict_on(const Variant& variant, const Device& device) {
    if (const std::string wrong = wrong_device(variant, device); !wrong.empty()) return {variant.name, false, wrong};
    if (!device.free_bytes || variant.memory_at.empty())
        return {variant.name, true, (variant.backend == "onnx" ? "Runs on the CPU of " : "Is made for ") + device.name,
                variant.context};
    const int64_t free = *device.free_bytes;
    const int64_t needed = variant.memory_at.at(variant.context);
    const std::string reason = "Needs " + size(needed) + " with its context of " + std::to_string(variant.context) +
                               " tokens, and " + size(free) + " are free";
    if (needed <= free) return {variant.name, true, reason, variant.context};
    int64_t longest = 0;
    for (const auto& [context, bytes] : variant.memory_at)
        if (bytes <= free) longest = context;
    const std::string rest = longest > 0 ? std::to_string(longest) + " tokens would fit" : "no context fits";
    return {variant.name, false, reason + ": " + rest, longest};
}

}  // namespace

std::vector<Verdict> judge(const Manifest& manifest, const Device& device) {
    std::vector<Verdict> verdicts;
    for (const Variant& variant : manifest.variants) verdicts.push_back(verdict_on(variant, device));
    return verdicts;
}

std::string cannot_run(const Variant& variant, const Device& device) {
    if (variant.backend == "onnx") return "";
    if (variant.backend != "qnn") return "Uses the backend " + variant.backend + ", which this program does not know";
    return device.qnn ? "" : "Needs an ONNX Runtime with QNN, which is not there";
}

const Variant& fitting(const Manifest& manifest, const Device& device) {
    std::string reasons;
    const std::vector<Verdict> verdicts = judge(manifest, device);
    for (size_t i = 0; i < verdicts.size(); ++i) {
        const Variant& variant = manifest.variants[i];
        const std::string reason = verdicts[i].fits ? cannot_run(variant, device) : verdicts[i].reason;
        if (reason.empty()) return variant;
        reasons += "; " + variant.name + ": " + reason;
    }
    throw Error("No variant of the bundle " + manifest.folder.string() + " fits this device" + reasons,
                "Export the model for this device, or name a variant with --variant");
}

}  // namespace transom
