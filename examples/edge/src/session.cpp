#include "session.hpp"

#include <algorithm>

#include "error.hpp"

namespace transom {

namespace {

std::vector<const char*> pointers(const std::vector<std::string>& names) {
    std::vector<const char*> out;
    for (const std::string& name : names) out.push_back(name.c_str());
    return out;
}

}  // namespace

Session::Session(const std::filesystem::path& path, const Ort::SessionOptions& options) : path_(path.string()) {
    try {
        session_ = Ort::Session(environment(), path.c_str(), options);
        Ort::AllocatorWithDefaultOptions allocator;
        for (size_t i = 0; i < session_.GetInputCount(); ++i)
            inputs_.emplace_back(session_.GetInputNameAllocated(i, allocator).get());
        for (size_t i = 0; i < session_.GetOutputCount(); ++i)
            outputs_.emplace_back(session_.GetOutputNameAllocated(i, allocator).get());
    } catch (const Ort::Exception& error) {
        throw Error(path_ + " cannot be opened: " + error.what(),
                    "Compare the bundle with its manifest by --check, or use a newer ONNX Runtime");
    }
}

Ort::ConstTensorTypeAndShapeInfo Session::info(const std::string& input, Ort::TypeInfo& owner) const {
    const auto found = std::find(inputs_.begin(), inputs_.end(), input);
    if (found == inputs_.end())
        throw Error(path_ + " has no input " + input, "Export the model again, for this version of Transom");
    owner = session_.GetInputTypeInfo(static_cast<size_t>(found - inputs_.begin()));
    if (owner.GetONNXType() != ONNX_TYPE_TENSOR)
        throw Error(path_ + " has the input " + input + ", which is not a tensor", "Export the model again, for this version of Transom");
    return owner.GetTensorTypeAndShapeInfo();
}

ONNXTensorElementDataType Session::element_type(const std::string& input) const {
    Ort::TypeInfo owner{nullptr};
    return info(input, owner).GetElementType();
}

std::vector<int64_t> Session::shape(const std::string& input) const {
    Ort::TypeInfo owner{nullptr};
    return info(input, owner).GetShape();
}

std::vector<Ort::Value> Session::run(const std::vector<Ort::Value>& values) {
    const auto in = pointers(inputs_), out = pointers(outputs_);
    try {
        return session_.Run(Ort::RunOptions{nullptr}, in.data(), values.data(), values.size(), out.data(), out.size());
    } catch (const Ort::Exception& error) {
        throw Error(path_ + " cannot be run: " + error.what(), "Compare the bundle with its manifest by --check");
    }
}

const Ort::MemoryInfo& Session::memory() {
    static const Ort::MemoryInfo info = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return info;
}

}  // namespace transom
