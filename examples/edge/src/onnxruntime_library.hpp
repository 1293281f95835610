// ONNX Runtime, opened while the program runs: one build serves every version of the library from that of the headers
// on, wherever it lies. The C++ API must be included through this file alone.
#pragma once

#include <map>
#include <string>

#ifndef ORT_API_MANUAL_INIT
#define ORT_API_MANUAL_INIT
#endif
#include <onnxruntime/onnxruntime_cxx_api.h>

namespace transom {

// Where ONNX Runtime and its QNN provider lie. Empty: as the system finds them.
struct Libraries {
    std::string onnxruntime;
    std::string qnn_provider;  // a provider library of its own; without one, it must be built into ONNX Runtime
    std::string qnn_backend = "libQnnHtp.so";
};

// Open the library; must come before any other use of ONNX Runtime. Does nothing the second time. Throws Error: not
// there, or older than the headers.
void open_onnxruntime(const Libraries& libraries);

// The process's one environment.
Ort::Env& environment();

// Whether QNN can be had. Opens the library.
bool has_qnn(const Libraries& libraries);

// Session options that run on the NPU by QNN, and nowhere else. Throws Error where QNN is not there.
Ort::SessionOptions qnn_options(const Libraries& libraries, const std::map<std::string, std::string>& qnn);

}  // namespace transom
