// One graph that ONNX Runtime runs, with the names of its inputs and outputs.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "onnxruntime_library.hpp"

namespace transom {

class Session {
public:
    // Throws Error.
    Session(const std::filesystem::path& path, const Ort::SessionOptions& options);

    const std::vector<std::string>& inputs() const { return inputs_; }
    const std::vector<std::string>& outputs() const { return outputs_; }
    ONNXTensorElementDataType element_type(const std::string& input) const;
    std::vector<int64_t> shape(const std::string& input) const;

    // Takes one value for each of `inputs()`, in order; returns one for each of `outputs()`. Throws Error.
    std::vector<Ort::Value> run(const std::vector<Ort::Value>& values);
    // A tensor over memory that must outlive it.
    template <typename Number>
    static Ort::Value tensor(Number* data, size_t count, const std::vector<int64_t>& shape) {
        return Ort::Value::CreateTensor<Number>(memory(), data, count, shape.data(), shape.size());
    }
    static Ort::Value tensor(void* data, size_t bytes, const std::vector<int64_t>& shape, ONNXTensorElementDataType type) {
        return Ort::Value::CreateTensor(memory(), data, bytes, shape.data(), shape.size(), type);
    }

private:
    static const Ort::MemoryInfo& memory();
    Ort::ConstTensorTypeAndShapeInfo info(const std::string& input, Ort::TypeInfo& owner) const;

    std::string path_;
    Ort::Session session_{nullptr};
    std::vector<std::string> inputs_, outputs_;
};

}  // namespace transom
