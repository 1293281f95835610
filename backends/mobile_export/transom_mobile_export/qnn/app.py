"""The section of a bundle's README that tells app developers how to use its HTP variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom_mobile_export.qnn.probing import libraries


def app_files(variant: Mapping[str, Any]) -> Mapping[str, bytes]:
    """The section of a bundle's README; see `transom.contract_optional.AppBackend`."""
    requires, folder = variant["requires"], variant["name"]
    shared = requires["weights"] == "shared"
    names = {
        "kotlin_share": KOTLIN_SHARE if shared else "", "cpp_share": CPP_SHARE if shared else "",
        "htp": requires["htp_arch"], "soc": requires["soc_model"], "folder": folder, "qnn": requires["qnn"],
        "sdk": requires["qnn_sdk"], "context": requires["context"],
        "chip": variant["target"].get("name") or variant["target"].get("id", ""),
        "libraries": "\n".join(f"- `{name}`" for name in libraries(int(requires["htp_arch"]))),
    }  # fmt: skip
    return {"README.md": README.format_map(names).encode()}


KOTLIN_SHARE = 'options.addConfigEntry("ep.share_ep_contexts", "1") // both graphs are in one context\n'
CPP_SHARE = 'options.AddConfigEntry("ep.share_ep_contexts", "1");\n'
README = """## The HTP of {chip}

`{folder}/` holds the decoder compiled for Hexagon v{htp} (soc_model {soc}), with a context of {context} tokens. It
opens only on that chip. `{folder}/qnn.json` describes its parts, inputs and caches.

### Libraries

It was compiled by Qualcomm's QNN {sdk} (onnxruntime-qnn {qnn}); libraries of QNN {sdk} or newer open it. Add to the
Gradle file `com.microsoft.onnxruntime:onnxruntime-android` (1.24.1 or newer), Qualcomm's provider for it,
`com.qualcomm.qti:onnxruntime-android-qnn:{qnn}`, and `com.qualcomm.qti:qnn-runtime:{sdk}`. Qualcomm's packages may only
be redistributed as part of your app. (Microsoft's `onnxruntime-android-qnn` contains an older provider.) The app's
folder of native libraries needs:

{libraries}

The last one runs on the DSP, which reads it from a file: set `android:extractNativeLibs="true"` (Gradle:
`packaging.jniLibs.useLegacyPackaging = true`), name `libcdsprpc.so` in `<uses-native-library>`, and set the library's
folder before you create the first session:

```kotlin
android.system.Os.setenv("ADSP_LIBRARY_PATH", applicationInfo.nativeLibraryDir, true)
```

`ADSP_LIBRARY_PATH` is read once per process; separate several folders with `;`.

### Opening a part

```kotlin
val qnn = "QNNExecutionProvider"
environment.registerExecutionProviderLibrary(qnn, "libonnxruntime_providers_qnn.so") // once
val options = OrtSession.SessionOptions()
options.addConfigEntry("session.disable_cpu_ep_fallback", "1")
{kotlin_share}options.addExecutionProvider(
    environment.epDevices.filter {{ it.epName == qnn }}.take(1),
    mapOf("backend_path" to "libQnnHtp.so", "htp_performance_mode" to "burst"),
)
val prefill = environment.createSession("$bundle/{folder}/part0_prefill.onnx", options)
val decode = environment.createSession("$bundle/{folder}/part0_decode.onnx", options)
```

```cpp
const std::string qnn = "QNNExecutionProvider";
environment.RegisterExecutionProviderLibrary(qnn.c_str(), "libonnxruntime_providers_qnn.so"); // once
std::vector<Ort::ConstEpDevice> devices;
for (const Ort::ConstEpDevice& device : environment.GetEpDevices())
    if (device.EpName() == qnn && devices.empty()) devices.push_back(device);
Ort::SessionOptions options;
options.AddConfigEntry("session.disable_cpu_ep_fallback", "1");
{cpp_share}const std::unordered_map<std::string, std::string> settings{{{{"backend_path", "libQnnHtp.so"}},
                                                                 {{"htp_performance_mode", "burst"}}}};
options.AppendExecutionProvider_V2(environment, devices, settings);
Ort::Session prefill(environment, (bundle + "/{folder}/part0_prefill.onnx").c_str(), options);
Ort::Session decode(environment, (bundle + "/{folder}/part0_decode.onnx").c_str(), options);
```

### A step

1. Look up the tokens' rows in the file `embedding.file` of `{folder}/qnn.json` (float16, path from the bundle's root),
   multiply them by `embedding.scale`, and pass them as float32 `hidden` [1, S, H]. `S` is `chunk` for `prefill`
   and 1 for `decode`. Pad a short chunk at its end.
2. `positions` [1, S] count up from the number of tokens in the cache, and stay below `context`.
3. `mask` [1, 1, S, C + S] is 0 where a token sees a column and `mask_low` elsewhere: columns 0 to C - 1 are the cache,
   filled from its beginning, and column C + i is token i of this step, seen by itself and later tokens. `mask_window`
   is the same for layers with a window, whose tokens see the last `window` positions, themselves included.
4. Run the parts in order: `hidden_out` of one is `hidden` of the next. `row` [1] is the token whose `logits` the last
   part returns.
5. Copy `new_key.N` and `new_value.N` of the tokens, not of the padding, after the tokens in `past_key.N` and
   `past_value.N`. They have the cache's dtype: never convert them.

If `qnn_variant` is 2, attention is sparse: a chunk begins at a multiple of 64 positions, and the graphs have more
inputs, which are computed from the numbers under `sparse` and listed in Transom's page on bundles for phones. Copy
`new_mean.N` and `new_variance.N` to the rows of `past_mean.N` and `past_variance.N` that begin with the node of the
chunk's first position.
"""
