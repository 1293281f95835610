"""This backend's part of a bundle's README.md: the code that runs the model in an app."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import Template
from typing import Any

from transom.text.defaults import GenerationDefaults
from transom_mobile_export.onnx.genai_config import LENGTH, padding

_HEAD = """\
## The portable decoder: ONNX Runtime GenAI

ONNX Runtime GenAI opens this folder: give it the path of the folder with `genai_config.json`. The model needs ONNX
Runtime 1.24 or newer and GenAI 0.14 or newer: older versions split some spaces and digits differently from the model's
tokenizer. It runs on any processor; no accelerator is used.

- A sequence is at most $context tokens long, prompt and answer together, and $usual unless you set `max_length`. GenAI
  allocates the cache for that length before the first token: $per_token kB per token, $cache MB for $usual.
- Tokens are chosen as set under `search` in `genai_config.json`$chosen. You can set `do_sample`, `temperature`,
  `top_k`, `top_p` and `repetition_penalty` for each generator.
- GenAI treats token $padding at the end of a prompt as padding and continues after the token before it.
$limits\
- GenAI's official packages may send usage data to their maker. The environment variable `ORT_DISABLE_TELEMETRY=1`, set
  before the library is loaded, turns that off; see GenAI's page on privacy.

"""
_TOKENS_ONLY = """\
The model came without a tokenizer, so this folder has none: pass token ids to `append_tokens` (`AppendTokens`,
`appendTokens`, `OgaGenerator_AppendTokens`), and read token ids back instead of text.
"""
_CODE = """\
chat|The steps are the same in each language: the model's chat template turns the messages into a prompt, the prompt is
chat|tokenized, and each new token is decoded. An empty template means the model's own; Java and C# accept no null.
text|The steps are the same in each language: the prompt is tokenized, and each new token is decoded. The model has no
text|chat template: it continues a text.

### Kotlin and Java (Android)

The file `onnxruntime-genai-android-….aar` of a release of GenAI, in the app's folder `libs`, and the package
`com.microsoft.onnxruntime:onnxruntime-android`. An app's assets are not files: copy the folder to `filesDir` first, or
download it there.

```kotlin
import ai.onnxruntime.genai.*

chat|fun answer(folder: String, messages: String, onText: (String) -> Unit) {
text|fun answer(folder: String, prompt: String, onText: (String) -> Unit) {
    Model(folder).use { model ->
        Tokenizer(model).use { tokenizer ->
chat|            val prompt = tokenizer.applyChatTemplate("", messages, null, true)
            GeneratorParams(model).use { params ->
                params.setSearchOption("max_length", $length.0)
                Generator(model, params).use { generator ->
                    tokenizer.encode(prompt).use { generator.appendTokenSequences(it) }
                    tokenizer.createStream().use { stream ->
                        while (!generator.isDone()) {
                            val length = generator.tokenCount()
                            generator.generateNextToken()
                            if (generator.tokenCount() > length) // a token that ends the answer is not appended
                                onText(stream.decode(generator.getLastTokenInSequence(0)))
                        }
                    }
                }
            }
        }
    }
}

text|answer(folder, "The sky is blue because") { print(it) }
chat|answer(folder, "[{\\"role\\": \\"user\\", \\"content\\": \\"Why is the sky blue?\\"}]") { print(it) }
```

Keep the `Model` and the `Tokenizer` for the lifetime of the app: loading takes longer than answering. Call from a
worker thread.

### Swift (iOS, macOS)

Pod `onnxruntime-genai-c`, with `#include "ort_genai_c.h"` in the bridging header. The pod `onnxruntime-genai-objc`
chat|wraps the same in classes (`OGAModel`, `OGATokenizer`, `OGAGenerator`), but for the chat template.
text|wraps the same in classes (`OGAModel`, `OGATokenizer`, `OGAGenerator`).

```swift
struct GenAIError: Error { let message: String }

func check(_ result: OpaquePointer?) throws {
    guard let result else { return }
    defer { OgaDestroyResult(result) }
    throw GenAIError(message: String(cString: OgaResultGetError(result)))
}

text|func answer(folder: String, prompt: String, onText: (String) -> Void) throws {
chat|func answer(folder: String, messages: String, onText: (String) -> Void) throws {
    var model, tokenizer, stream, params, generator, sequences: OpaquePointer?
chat|    var prompt: UnsafePointer<CChar>?
    try check(OgaCreateModel(folder, &model))
    defer { OgaDestroyModel(model) }
    try check(OgaCreateTokenizer(model, &tokenizer))
    defer { OgaDestroyTokenizer(tokenizer) }
    try check(OgaCreateTokenizerStream(tokenizer, &stream))
    defer { OgaDestroyTokenizerStream(stream) }
chat|    try check(OgaTokenizerApplyChatTemplate(tokenizer, nil, messages, nil, true, &prompt))
chat|    defer { OgaDestroyString(prompt) }
    try check(OgaCreateSequences(&sequences))
    defer { OgaDestroySequences(sequences) }
    try check(OgaTokenizerEncode(tokenizer, prompt, sequences))
    try check(OgaCreateGeneratorParams(model, &params))
    defer { OgaDestroyGeneratorParams(params) }
    try check(OgaGeneratorParamsSetSearchNumber(params, "max_length", $length))
    try check(OgaCreateGenerator(model, params, &generator))
    defer { OgaDestroyGenerator(generator) }
    try check(OgaGenerator_AppendTokenSequences(generator, sequences))
    while !OgaGenerator_IsDone(generator) {
        try check(OgaGenerator_GenerateNextToken(generator))
        var tokens: UnsafePointer<Int32>?, count = 0, text: UnsafePointer<CChar>?
        try check(OgaGenerator_GetNextTokens(generator, &tokens, &count))
        try check(OgaTokenizerStreamDecode(stream, tokens![0], &text))
        onText(String(cString: text!))
    }
}
```

### C#

Package `Microsoft.ML.OnnxRuntimeGenAI`.

```csharp
using Microsoft.ML.OnnxRuntimeGenAI;

using var model = new Model(folder);
using var tokenizer = new Tokenizer(model);
using var stream = tokenizer.CreateStream();
chat|var messages = "[{\\"role\\": \\"user\\", \\"content\\": \\"Why is the sky blue?\\"}]";
chat|using var prompt = tokenizer.Encode(tokenizer.ApplyChatTemplate("", messages, "", true));
text|using var prompt = tokenizer.Encode("The sky is blue because");
using var options = new GeneratorParams(model);
options.SetSearchOption("max_length", $length);
using var generator = new Generator(model, options);
generator.AppendTokenSequences(prompt);
while (!generator.IsDone())
{
    generator.GenerateNextToken();
    Console.Write(stream.Decode(generator.GetNextTokens()[0]));
}
```

### Python

`pip install onnxruntime-genai`

```python
chat|import json
chat|
import onnxruntime_genai as og

model = og.Model("bundle")  # the path of this folder
tokenizer = og.Tokenizer(model)
stream = tokenizer.create_stream()
chat|messages = json.dumps([{"role": "user", "content": "Why is the sky blue?"}])
params = og.GeneratorParams(model)
params.set_search_options(max_length=$length)
generator = og.Generator(model, params)
text|generator.append_tokens(tokenizer.encode("The sky is blue because"))
chat|generator.append_tokens(tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True)))
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```

### C++

Headers `ort_genai.h` and `ort_genai_c.h` of a release, and the library `onnxruntime-genai`.

```cpp
#include <iostream>

#include "ort_genai.h"

int main(int, char** arguments) {
  auto model = OgaModel::Create(arguments[1]);
  auto tokenizer = OgaTokenizer::Create(*model);
  auto stream = OgaTokenizerStream::Create(*tokenizer);
chat|  const char* messages = R"([{"role": "user", "content": "Why is the sky blue?"}])";
chat|  auto prompt = tokenizer->ApplyChatTemplate(nullptr, messages, nullptr, true);
  auto sequences = OgaSequences::Create();
chat|  tokenizer->Encode(prompt, *sequences);
text|  tokenizer->Encode("The sky is blue because", *sequences);
  auto params = OgaGeneratorParams::Create(*model);
  params->SetSearchOption("max_length", $length);
  auto generator = OgaGenerator::Create(*model, *params);
  generator->AppendTokenSequences(*sequences);
  while (!generator->IsDone()) {
    generator->GenerateNextToken();
    std::cout << stream->Decode(generator->GetNextTokens()[0]) << std::flush;
  }
}
```
"""
"""Lines that begin with `chat|` are for models with a chat template, those with `text|` for models without one."""
_LENGTH = 1024
"""`max_length` in the examples."""


def readme(
    decoder: Mapping[str, Any],
    variant: Mapping[str, Any],
    generation: GenerationDefaults,
    texts: Mapping[str, bytes],
) -> str:
    """The section, in Markdown; the same for variants of the same files.

    Args:
        decoder, variant: objects from the manifest.
        texts: the bundle's text files, by name.
    """
    per_token = variant["memory"]["cache_per_token"]
    tokenizer = json.loads(texts.get("tokenizer_config.json", b"{}"))
    limits = "".join(f"- {line}\n" for line in _limits(decoder, generation, tokenizer))
    code = _told(chat="chat_template" in tokenizer) if "tokenizer.json" in texts else _TOKENS_ONLY
    text = Template(_HEAD + code)
    context = variant["context"]
    usual = min(context, LENGTH)
    return text.substitute(
        context=context, usual=usual, per_token=f"{per_token / 1e3:.3g}",
        cache=f"{per_token * usual / 1e6:.3g}", padding=padding(generation),
        chosen=", as the model's authors recommend" if generation.temperature else "",
        limits=limits, length=min(_LENGTH, context),
    )  # fmt: skip


def _told(*, chat: bool) -> str:
    """The lines of `_CODE` for a model with or without a chat template."""
    own, other = ("chat|", "text|") if chat else ("text|", "chat|")
    return "".join(x.removeprefix(own) for x in _CODE.splitlines(keepends=True) if not x.startswith(other))


def _limits(decoder: Mapping[str, Any], generation: GenerationDefaults, tokenizer: Mapping[str, Any]) -> list[str]:
    """What the model needs, but GenAI does not do by default, or not in older versions.

    Args:
        tokenizer: the contents of `tokenizer_config.json`.
    """
    found = []
    if tokenizer.get("add_bos_token"):
        found.append(
            f"The model's tokenizer puts `{tokenizer.get('bos_token')}` before a text, and GenAI's does so "
            "only if its option `add_special_tokens` is true. Chat templates already contain it."
        )
    if len({(layer["kv_heads"], layer["head_dim"]) for layer in decoder["layers"]}) > 1:
        found.append("The caches of its layers differ in shape, which GenAI 0.14 refuses and 0.18 supports.")
    for name in ("min_p", "presence_penalty", "frequency_penalty"):
        if value := getattr(generation, name):
            found.append(f"The model's authors recommend `{name}` {value:g}, for which GenAI has no option.")
    if generation.stop:
        found.append(f"GenAI stops only at tokens. End an answer yourself at: {', '.join(map(repr, generation.stop))}.")
    if generation.suppress_ids:
        found.append("The model's authors exclude some tokens from sampling, which GenAI cannot do: "
                     f"{', '.join(map(str, generation.suppress_ids))}.")  # fmt: skip
    return found
