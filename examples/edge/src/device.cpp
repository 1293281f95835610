#include "device.hpp"

#include <fstream>
#include <map>
#include <stdexcept>

#ifdef __ANDROID__
#include <sys/system_properties.h>
#endif

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "files.hpp"

namespace transom {

namespace {

struct Numbers {
    const char* soc_model;
    const char* htp_arch;
};

// QNN_SOC_MODEL_* of QnnTypes.h and the Hexagon version, by Qualcomm's name for the chip.
const std::map<std::string, Numbers> chips = {
    {"SM8450", {"36", "69"}}, {"SM8475", {"42", "69"}}, {"SM8550", {"43", "73"}}, {"SM8650", {"57", "75"}},
    {"SM8750", {"69", "79"}}, {"SM8850", {"87", "81"}}, {"SC8380XP", {"60", "73"}},
};

std::string chip_name() {
#ifdef __ANDROID__
    char value[PROP_VALUE_MAX] = {};
    __system_property_get("ro.soc.model", value);
    return value;
#else
    std::string name;
    std::ifstream("/sys/devices/soc0/machine") >> name;  // present if the kernel recognises a Qualcomm chip
    return name;
#endif
}

const char* cpu_arch() {
#if defined(__aarch64__)
    return "aarch64";
#elif defined(__x86_64__)
    return "x86_64";
#elif defined(__arm__)
    return "arm";
#else
    return "unknown";
#endif
}

// The memory available to a program without swapping (proc(5)).
std::optional<int64_t> free_memory() {
    std::ifstream file("/proc/meminfo");
    std::string name, unit;
    for (int64_t kilobytes = 0; file >> name >> kilobytes; std::getline(file, unit))
        if (name == "MemAvailable:") return kilobytes * 1024;
    return std::nullopt;
}

}  // namespace

Device this_device(const Libraries& libraries) {
    Device device;
    device.kind = "cpu";
    device.arch = cpu_arch();
    device.free_bytes = free_memory();
    const std::string name = chip_name();
    device.name = "this device (" + (name.empty() ? device.arch : name) + ")";
    if (const auto chip = chips.find(name); chip != chips.end()) {
        device.soc_model = chip->second.soc_model;
        device.htp_arch = chip->second.htp_arch;
    }
    try {
        device.qnn = has_qnn(libraries);
    } catch (const Error&) {
        device.qnn = false;  // no ONNX Runtime: opening a model will report why
    }
    return device;
}

Device read_device(const std::filesystem::path& path) {
    const nlohmann::json data = read_json(path);
    const auto none = [&path] {
        return Error(path.string() + " describes no device", "Write one with: transom doctor --json > device.json");
    };
    try {
        const nlohmann::json& first = data.at("devices").at(0);
        Device device;
        device.kind = first.at("kind").get<std::string>();
        device.name = first.value("name", "");
        if (device.name.empty()) device.name = first.at("id").get<std::string>();
        device.arch = first.at("arch").get<std::string>();
        const auto drivers = first.value("drivers", std::map<std::string, std::string>());
        const auto driver = [&drivers](const char* key) {
            const auto found = drivers.find(key);
            return found == drivers.end() ? std::string() : found->second;
        };
        device.soc_model = driver("soc_model");
        device.htp_arch = driver("htp_arch");
        if (const auto free = first.find("free_bytes"); free != first.end() && !free->is_null())
            device.free_bytes = whole_number(*free);
        else if (const auto bytes = first.find("memory_bytes"); bytes != first.end() && whole_number(*bytes) > 0)
            device.free_bytes = whole_number(*bytes);
        return device;
    } catch (const nlohmann::json::exception&) {
        throw none();
    } catch (const std::out_of_range&) {
        throw none();
    }
}

}  // namespace transom
