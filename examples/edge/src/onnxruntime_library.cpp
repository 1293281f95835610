#include "onnxruntime_library.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <vector>

#include "error.hpp"

namespace transom {

namespace {

constexpr const char* provider = "QNNExecutionProvider";

const OrtApiBase* opened(const std::string& path) {
    std::vector<std::string> names = {path};
    if (path.empty()) names = {"libonnxruntime.so", "libonnxruntime.so.1"};
    std::string said;
    for (const std::string& name : names) {
        void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            said = dlerror();
            continue;
        }
        using Getter = const OrtApiBase* (*)();
        if (const auto get = reinterpret_cast<Getter>(dlsym(library, "OrtGetApiBase"))) return get();
        said = name + " is not ONNX Runtime";
    }
    throw Error("ONNX Runtime cannot be opened: " + said, "Name its library with --onnxruntime PATH");
}

#if ORT_API_VERSION >= 22
std::vector<Ort::ConstEpDevice> plugin_devices(const Libraries& libraries) {
    [[maybe_unused]] static const bool registered = [&libraries] {
        try {
            environment().RegisterExecutionProviderLibrary(provider, libraries.qnn_provider);
        } catch (const Ort::Exception& error) {
            throw Error("The QNN provider " + libraries.qnn_provider + " cannot be opened: " + error.what(),
                        "Name another library, or another variant");
        }
        return true;
    }();
    std::vector<Ort::ConstEpDevice> devices;
    for (const Ort::ConstEpDevice& device : environment().GetEpDevices())
        if (device.EpName() == std::string(provider)) devices.push_back(device);
    return devices;
}
#endif

bool is_built_in() {
    const std::vector<std::string> there = Ort::GetAvailableProviders();
    return std::find(there.begin(), there.end(), provider) != there.end();
}

}  // namespace

void open_onnxruntime(const Libraries& libraries) {
    // A second thread waits; if opening throws, the next call tries again
    [[maybe_unused]] static const bool done = [&libraries] {
        const OrtApiBase* base = opened(libraries.onnxruntime);
        const OrtApi* api = base->GetApi(ORT_API_VERSION);
        if (api == nullptr)
            throw Error(std::string("ONNX Runtime has version ") + base->GetVersionString() + ", and this program needs 1." +
                            std::to_string(ORT_API_VERSION) + " or newer",
                        "Name a newer library with --onnxruntime PATH");
        Ort::InitApi(api);
        return true;
    }();
}

Ort::Env& environment() {
    static Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "transom");
    return env;
}

bool has_qnn(const Libraries& libraries) {
    open_onnxruntime(libraries);
    return !libraries.qnn_provider.empty() || is_built_in();
}

Ort::SessionOptions qnn_options(const Libraries& libraries, const std::map<std::string, std::string>& qnn) {
    open_onnxruntime(libraries);
    std::unordered_map<std::string, std::string> options(qnn.begin(), qnn.end());
    options["backend_path"] = libraries.qnn_backend;
    Ort::SessionOptions session;
    session.AddConfigEntry("session.disable_cpu_ep_fallback", "1");
    if (!libraries.qnn_provider.empty()) {
#if ORT_API_VERSION >= 22
        const std::vector<Ort::ConstEpDevice> devices = plugin_devices(libraries);
        if (devices.empty())
            throw Error("The QNN provider " + libraries.qnn_provider + " finds no NPU here", "Name another variant");
        session.AppendExecutionProvider_V2(environment(), {devices.front()}, options);
#else
        throw Error("This program was built with headers of ONNX Runtime 1." + std::to_string(ORT_API_VERSION) +
                        ", which cannot open a provider library",
                    "Build it with headers of 1.22 or newer, or use a library that has QNN built in");
#endif
    } else if (is_built_in()) {
        session.AppendExecutionProvider("QNN", options);
    } else {
        throw Error("This ONNX Runtime has no QNN, which a bundle for a Snapdragon needs",
                    "Name its provider library with --qnn-provider, or another variant with --variant");
    }
    return session;
}

}  // namespace transom
