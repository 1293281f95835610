// ONNX Runtime, loaded at run time: one build works with every version of the library from that of the headers on,
// wherever it is. Include the C++ API only through this file.
#pragma once

#include <map>
#include <string>

#ifndef ORT_API_MANUAL_INIT
#define ORT_API_MANUAL_INIT
#endif
#include <onnxruntime/onnxruntime_cxx_api.h>

namespace transom {

// The paths of ONNX Runtime and its QNN provider. Empty: the system finds them.
struct Libraries {
    std::string onnxruntime;
    std::string qnn_provider;  // a separate provider library; empty: QNN must be built into ONNX Runtime
    std::string qnn_backend = "libQnnHtp.so";
};

// Open the library, before any other use of ONNX Runtime. A second call does nothing. Throws Error: not found, or older
// than the headers.
void open_onnxruntime(const Libraries& libraries);

// The process's one environment.
Ort::Env& environment();

// Whether QNN is available. Opens the library.
bool has_qnn(const Libraries& libraries);

// Session options that run only on the NPU, through QNN. Throws Error if QNN is missing.
Ort::SessionOptions qnn_options(const Libraries& libraries, const std::map<std::string, std::string>& qnn);

}  // namespace transom
