"""How the transformers package reads a GGUF file and what it misreads, for comparing a model with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transom.sources.base import Pretrained
from transom.sources.gguf_file import open_gguf


def original(path: Path) -> Pretrained:
    """The file as transformers reads it.

    Raises:
        SourceError: the file cannot be read.
    """
    file = open_gguf(path)
    arguments: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    table = file.tensors.get("token_embd.weight")
    if table is not None:  # transformers assumes the family's usual size if the file has none
        arguments["vocab_size"] = int(table.shape[0])
    kind = "GGUF files of this architecture"
    fix = f"It may not support {kind}; verify the Hugging Face directory that the model was made from"
    return Pretrained(path, arguments, kind, fix, partial(misread_settings, file.metadata))


def misread_settings(metadata: Mapping[str, Any], config: Mapping[str, Any], windows: Sequence[int]) -> list[str]:
    """The settings of a GGUF file that transformers misreads, each as text.

    Args:
        metadata: the file's metadata.
        config: the configuration that transformers made from the file.
        windows: the sliding window of each layer as Transom reads the file; 0: none.
    """
    arch = metadata.get("general.architecture")

    def stated(key: str) -> Any:
        return metadata.get(f"{arch}.{key}")

    found: list[str] = []

    def compare_numbers(what: str, ours: Any, theirs: Any) -> None:
        if not isinstance(ours, int | float):
            return
        if not isinstance(theirs, int | float):
            found.append(f"the {what} {ours:.6g} is left out")
        elif abs(ours - theirs) > 1e-5 * max(abs(ours), abs(theirs)):
            found.append(f"the {what} is {ours:.6g}, transformers takes {theirs:.6g}")

    window, kinds = config.get("sliding_window") or 0, config.get("layer_types")
    if config.get("use_sliding_window") is False:
        window = 0
    theirs = [window if kind == "sliding_attention" else 0 for kind in kinds] if kinds else [window] * len(windows)
    if list(windows) != theirs:
        size, other = max(windows, default=0), max(theirs, default=0)
        if size and not other:
            found.append(f"the sliding window of {size} tokens is left out")
        elif size == other:
            found.append(f"the sliding window of {size} tokens is on other layers")
        else:
            found.append(f"the sliding window is {size or 'off'}, transformers takes {other}")
    for key, name, what in (
        ("attn_logit_softcapping", "attn_logit_softcapping", "soft cap of attention"),
        ("final_logit_softcapping", "final_logit_softcapping", "soft cap of the logits"),
        ("attention.layer_norm_rms_epsilon", "rms_norm_eps", "epsilon of the norms"),
        ("attention.key_length", "head_dim", "size of a head"),
    ):
        if name in config or key.endswith("softcapping"):
            compare_numbers(what, stated(key), config.get(name))
    if scalar := config.get("query_pre_attn_scalar"):
        length = stated("attention.key_length")
        scale = stated("attention.scale") or (length**-0.5 if isinstance(length, int) and length > 0 else None)
        compare_numbers("scale of attention", scale, scalar**-0.5)
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if isinstance(rope, Mapping):
        compare_numbers("base of the rotary embedding", stated("rope.freq_base"), rope.get("rope_theta"))
        kind = stated("rope.scaling.type")
        if kind not in (None, "none"):
            if rope.get("rope_type", "default") == "default":
                found.append(f"the rotary scaling ({kind}) is left out")
            else:
                compare_numbers("factor of the rotary scaling", stated("rope.scaling.factor"), rope.get("factor"))
    return found
