"""The reference of ConvTranspose is what onnxruntime computes, for one to three axes and all its attributes.

Draws: both sum the same few float32 products in another order. Where SAME pads an axis whose kernel is shorter than its
stride, onnxruntime gives less than the size that ONNX states, so that no draw has it.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from onnx_models import Writer, runtime, value

from transom.ops.conv_transpose import reference


def drawn(dice: random.Random) -> tuple[dict[str, Any], list[int], list[int], int]:
    """Attributes, sizes of the input, of the kernel, and the number of groups."""
    rank, group = dice.choice((1, 2, 2, 3)), dice.choice((1, 1, 2, 3))
    sizes, kernel, dilations = ([dice.randint(1, most) for _ in range(rank)] for most in (6, 4, 2))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    strides = [dice.randint(1, min(3, most)) for most in reach]
    attributes: dict[str, Any] = {"group": group, "strides": strides, "dilations": dilations}
    if dice.random() < 0.3:
        attributes["output_padding"] = [dice.randint(0, s - 1) for s in strides]
    how = dice.choice(("pads", "auto_pad", "output_shape", ""))
    if how == "pads":
        attributes[how] = [dice.randint(0, (most - 1) // 2) for most in (*reach, *reach)]
    if how == "auto_pad":
        attributes[how] = dice.choice(("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"))
    if how == "output_shape":
        attributes[how] = [n * s for n, s in zip(sizes, strides, strict=True)]
    return attributes, sizes, kernel, group


def test_it_is_what_onnxruntime_computes(rng: np.random.Generator, dice: random.Random) -> None:
    for _ in range(60):
        attributes, sizes, kernel, group = drawn(dice)
        channels, made = group * dice.randint(1, 3), dice.randint(1, 3)
        w = Writer(rng)
        x = rng.standard_normal((2, channels, *sizes)).astype(np.float32)
        more = [rng.standard_normal((channels, made, *kernel)).astype(np.float32)]
        more += [rng.standard_normal(group * made).astype(np.float32)] * dice.randint(0, 1)
        w.op("ConvTranspose", "x", *map(w.constant, more), outputs=["y"], **attributes)
        (wanted,) = runtime(w.model([value("x", shape=x.shape)], [value("y")])).run(None, {"x": x})
        (found,) = reference([x, *more], attributes)
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=f"{attributes} {sizes} {kernel}", strict=True)
