"""Opening an ONNX file safely: damage is found before anything is computed, and nothing outside its folder is read.

Weights inside the file are kept as parsed. Weights in files beside it are mapped when they are first read.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import onnx_ir as ir

from transom.errors import SourceError
from transom.sources.base import summarize

_AGAIN = "Get the file again from where it was published, or export the model again"


def open_onnx(path: Path) -> tuple[ir.Model, list[Path]]:
    """(the model with lazy weights, the file and the files with its weights).

    Raises:
        SourceError: not an ONNX file, a truncated file, a weight with missing or too many bytes, a data file that is
            missing or outside the model's folder.
    """
    import onnx

    decode_error = importlib.import_module("google.protobuf.message").DecodeError  # protobuf has no type annotations

    try:
        data = path.read_bytes()
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e.strerror or e}", "Check the path and its permissions") from e
    if not data:
        raise SourceError(f"{path} is an empty file", _AGAIN)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except decode_error as e:
        raise SourceError(f"{path} is not an ONNX file, or it is cut short or damaged", _AGAIN) from e
    del data
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise SourceError(f"{path} holds no graph: it is not an ONNX file, or it is cut short", _AGAIN)
    if not proto.graph.output:
        raise SourceError(f"The graph in {path} has no outputs: the file is cut short or damaged", _AGAIN)
    if proto.ir_version < 3:
        raise SourceError(f"{path} has the ONNX IR version {proto.ir_version}; Transom reads 3 and later", _AGAIN)
    files = _check_tensors(proto, path)
    _check_names(proto.graph, path)
    _check_functions(proto, path)
    _check_wiring(proto, path)
    try:
        model = ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise SourceError(f"{path} is not valid ONNX: {e}", _AGAIN) from e
    return model, [path, *files]


def data_files(path: Path) -> list[Path]:
    """The files of a model: the file itself, and those with its weights."""
    return open_onnx(path)[1]


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        yield from _tensors_of_node(node)


def _tensors_of_node(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from _tensors(attribute.g)
        for inner in attribute.graphs:
            yield from _tensors(inner)


def _check_tensors(proto: Any, path: Path) -> list[Path]:
    files: dict[Path, int] = {}
    every = list(_tensors(proto.graph))
    for function in proto.functions:
        for node in function.node:
            every.extend(_tensors_of_node(node))
    for tensor in every:
        if tensor.data_location == tensor.EXTERNAL:
            _check_external(tensor, path, files)
        else:
            _check_inside(tensor, path)
    return list(files)


def _expected_bytes(tensor: Any, path: Path) -> int | None:
    """Bytes that a tensor's type and shape need; None for strings."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as e:
        raise SourceError(
            f"The tensor {tensor.name} in {path} has the unknown element type {tensor.data_type}", _AGAIN
        ) from e
    if dtype == ir.DataType.UNDEFINED or any(d < 0 for d in tensor.dims):
        raise SourceError(f"The tensor {tensor.name} in {path} has no type or an impossible shape", _AGAIN)
    if dtype == ir.DataType.STRING:
        return None
    count = 1
    for dim in tensor.dims:
        count *= dim
    return -(-count * dtype.bitwidth // 8)


_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def _numbers(tensor: Any) -> tuple[str, int]:
    """(the field that holds the numbers of a tensor without raw bytes, how many of them its shape needs)."""
    dtype = ir.DataType(tensor.data_type)
    count = 1
    for dim in tensor.dims:
        count *= dim
    if dtype in (ir.DataType.FLOAT, ir.DataType.COMPLEX64):
        return "float_data", count * (1 + (dtype == ir.DataType.COMPLEX64))
    if dtype in (ir.DataType.DOUBLE, ir.DataType.COMPLEX128):
        return "double_data", count * (1 + (dtype == ir.DataType.COMPLEX128))
    if dtype == ir.DataType.INT64:
        return "int64_data", count
    if dtype in (ir.DataType.UINT32, ir.DataType.UINT64):
        return "uint64_data", count
    if dtype == ir.DataType.STRING:
        return "string_data", count
    packed = 8 // dtype.bitwidth if dtype.bitwidth < 8 else 1
    return "int32_data", -(-count // packed)


def _check_inside(tensor: Any, path: Path) -> None:
    expected = _expected_bytes(tensor, path)
    if not tensor.HasField("raw_data"):
        field, count = _numbers(tensor)
        filled = [f for f in _FIELDS if len(getattr(tensor, f))]
        if len(getattr(tensor, field)) != count or any(f != field for f in filled):
            raise SourceError(
                f"The tensor {tensor.name} in {path} has {len(getattr(tensor, field))} numbers; its shape "
                f"{list(tensor.dims)} needs {count}",
                _AGAIN,
            )
        return
    if expected is None:
        raise SourceError(f"The tensor {tensor.name} in {path} has raw bytes, which cannot be strings", _AGAIN)
    if len(tensor.raw_data) != expected:
        raise SourceError(
            f"The tensor {tensor.name} in {path} has {len(tensor.raw_data)} bytes; its shape {list(tensor.dims)} needs "
            f"{expected}",
            _AGAIN,
        )


def _check_external(tensor: Any, path: Path, files: dict[Path, int]) -> None:
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    where = inside(location, path, str(tensor.name))
    for entry in tensor.external_data:
        if entry.key == "location":
            # Checked here already. onnx_ir would check again on reading, and refuse the links of the hub's cache and
            # hard-linked files. It does not check a tensor without a base folder.
            entry.value = str(where.resolve())
    if where not in files:
        try:
            files[where] = where.stat().st_size
        except OSError as e:
            raise SourceError(
                f"The weights of {path} lie in {where}, which is missing",
                "Put a file of that name beside the model",
            ) from e
    expected = _expected_bytes(tensor, path)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries["length"]) if "length" in entries else expected or 0
    except ValueError as e:
        raise SourceError(
            f"The tensor {tensor.name} of {path} has no valid offset and length in {where.name}", _AGAIN
        ) from e
    if offset < 0 or length < 0 or offset + length > files[where]:
        raise SourceError(
            f"The tensor {tensor.name} of {path} should be at bytes {offset} … {offset + length} of {where}; it has "
            f"{files[where]} bytes: that file is cut short, or belongs to another model",
            _AGAIN,
        )
    if expected is not None and length != expected:
        raise SourceError(
            f"The tensor {tensor.name} of {path} has {length} bytes in {where}; its shape {list(tensor.dims)} needs "
            f"{expected}",
            _AGAIN,
        )


def inside(location: str, path: Path, tensor: str) -> Path:
    """The data file that a model names. It must be in the model's folder.

    A link to another folder is refused too, unless the model's own file is a link into the same folder, as in the cache
    of the Hugging Face hub.

    Raises:
        SourceError: the file is outside the model's folder.
    """
    outside = SourceError(
        f"The tensor {tensor} of {path} points outside the model's folder, to {location!r}; such a model could read "
        "any file of yours",
        "Get the model from a source you trust, or put its data file beside it",
    )
    if not location or "\x00" in location:
        raise SourceError(f"The tensor {tensor} of {path} does not name its data file", _AGAIN)
    for kind in (PurePosixPath(location), PureWindowsPath(location)):
        if kind.is_absolute() or kind.drive or kind.root or ".." in kind.parts:
            raise outside
    where = path.parent / location
    real, home = where.resolve(), path.parent.resolve()
    if not real.is_relative_to(home) and real.parent != path.resolve().parent:
        raise outside
    return where


def _twice(names: Iterable[str]) -> str:
    """The first name that comes twice; empty if none does."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""


def _check_names(graph: Any, path: Path) -> None:
    """Check that each value of a graph, and of the graphs inside its nodes, has one origin, and each output a name."""
    inputs, weights = [v.name for v in graph.input], [t.name for t in graph.initializer]
    made = [name for node in graph.node for name in node.output if name]
    outputs = [v.name for v in graph.output]
    if "" in (*inputs, *outputs):
        raise SourceError(f"An input or output of the graph {graph.name} in {path} has no name", _AGAIN)
    if name := _twice(outputs):
        raise SourceError(f"The graph {graph.name} in {path} lists its output {name} twice", _AGAIN)
    if name := _twice(inputs) or _twice(weights) or _twice([*dict.fromkeys((*inputs, *weights)), *made]):
        raise SourceError(f"The value {name} of {path} is defined twice", _AGAIN)
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for part in (*inner, *attribute.graphs):
                if not part.output:
                    inside = f"The graph {part.name} inside the node {node.name or node.op_type}"
                    raise SourceError(f"{inside} of {path} has no outputs", _AGAIN)
                _check_names(part, path)


def _check_functions(proto: Any, path: Path) -> None:
    """Check that every function is defined once, computes its outputs, and reads what it is given."""
    if name := _twice(f"{f.domain}::{f.name}:{f.overload}" for f in proto.functions):
        raise SourceError(f"The function {name.rstrip(':')} of {path} is defined twice", _AGAIN)
    for function in proto.functions:
        where = f"The function {function.domain}::{function.name} of {path}"
        known = set(function.input) | {""}
        if name := _twice([*function.input, *(o for n in function.node for o in n.output if o)]):
            raise SourceError(f"{where} defines the value {name} twice", _AGAIN)
        for node in function.node:
            if missing := [name for name in node.input if name not in known]:
                raise SourceError(f"{where} reads {summarize(missing)}, which no node before it produces", _AGAIN)
            known.update(node.output)
        if missing := [name for name in function.output if name not in known]:
            raise SourceError(f"{where} does not compute its output {missing[0]}", _AGAIN)


def _check_wiring(proto: Any, path: Path) -> None:
    """Check that every input of a node in the main graph is produced before the node."""
    known = {v.name for v in proto.graph.input} | {t.name for t in proto.graph.initializer} | {""}
    known |= {t.values.name for t in proto.graph.sparse_initializer}
    for node in proto.graph.node:
        missing = [name for name in node.input if name not in known]
        if missing:
            raise SourceError(
                f"The node {node.name or node.op_type} ({node.op_type}) in {path} reads {summarize(missing)}, which "
                "no node before it produces: the file is damaged, or its nodes are out of order",
                _AGAIN,
            )
        known.update(node.output)
    if missing := [v.name for v in proto.graph.output if v.name not in known]:
        raise SourceError(f"No node in {path} produces its output {missing[0]}: the file is cut short", _AGAIN)
