"""The contract's signatures change only together with `API_VERSION`.

When this fails and the change is meant: raise `API_VERSION` in `transom/contract.py` (the major number when a plugin
written for the old one would break), then run `python tests/contract/test_signatures.py` and put the line it prints
into `DIGESTS`. The lines of older versions stay: they are history.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, get_args

import pytest

from transom import contract, contract_optional

DIGESTS: dict[tuple[int, int], str] = {
    (1, 0): "801ac1555b3e3ff3d19c7d2c5108b196",
    (1, 1): "d45be602c0c5a3c5adb5d37f97f617fc",
    (1, 2): "359d75b967c10f02d51f0a88ad6bc23c",
    (1, 3): "39af97f387f0d467ec33e28d5ac2044d",
    (1, 4): "39af97f387f0d467ec33e28d5ac2044d",  # `Options` has one more key, which no signature shows
    (1, 5): "7e1d2cb656645a1e3c791dd4b74787cc",  # the last one of a single file
    (1, 6): "af480acbedb0229c49aea4e9486425e8",
    (1, 7): "790982ca411af8d9e34cb258ef770ae6",
    (1, 8): "c1f6da09109c1c8cab5c96decae19255",
    (1, 9): "c1f6da09109c1c8cab5c96decae19255",  # `Options` has one more key
}
MODULES = (contract, contract_optional)


def described(modules: Sequence[Any] = MODULES) -> list[str]:
    """One line for each public name a plugin or the host can depend on: fields, methods, hooks, types, constants.

    Annotations are taken as they are written, so that no optional import is needed; docstrings and order of
    definitions do not count, the order of fields and arguments does.
    """
    lines: list[str] = []
    for module in modules:
        for name in sorted(vars(module)):
            thing = getattr(module, name)
            if name.startswith("_") or inspect.ismodule(thing):
                continue
            if inspect.isclass(thing) and thing.__module__ == module.__name__:
                lines += _class_lines(name, thing)
            elif get_args(thing) or (isinstance(thing, str) and name != "API_VERSION"):
                lines.append(f"{name} = {thing!r}")
    return lines


def _class_lines(name: str, cls: type) -> list[str]:
    bases = ", ".join(base.__name__ for base in cls.__bases__)
    lines = [f"class {name}({bases})"]
    if dataclasses.is_dataclass(cls):
        parameters = cls.__dataclass_params__  # type: ignore[attr-defined]
        lines[0] += f" frozen={parameters.frozen} eq={parameters.eq}"
        for field in dataclasses.fields(cls):
            default = repr(field.default) if field.default is not dataclasses.MISSING else ""
            if field.default_factory is not dataclasses.MISSING:
                default = f"{field.default_factory.__name__}()"  # type: ignore[attr-defined]
            lines.append(f"  {name}.{field.name}: {field.type} = {default}")
    for attribute in sorted(vars(cls)):
        member = vars(cls)[attribute]
        if attribute.startswith("_") or (dataclasses.is_dataclass(cls) and attribute in cls.__annotations__):
            continue
        if isinstance(member, property) and member.fget:
            lines.append(f"  {name}.{attribute} -> {inspect.signature(member.fget).return_annotation}")
        elif inspect.isfunction(member):
            options = {k: v for k, v in (getattr(member, "transom_spec", None) or {}).items() if v}
            lines.append(f"  {name}.{attribute}{inspect.signature(member)} {options or ''}".rstrip())
    return lines


def digest(modules: Sequence[Any] = MODULES) -> str:
    return hashlib.sha256("\n".join(described(modules)).encode()).hexdigest()[:32]


def test_the_signatures_are_those_of_the_api_version() -> None:
    expected = DIGESTS.get(contract.API_VERSION)
    now = "\n".join(described())
    assert digest() == expected, (
        f"The contract changed and API_VERSION is still {contract.API_VERSION}; see the top of this file. Now:\n{now}"
    )


def test_every_public_class_of_the_contract_is_covered() -> None:
    text = "\n".join(described())
    for name in ("Device", "Offer", "Refusal", "Claim", "Artifact", "Verdict", "State", "Work", "Limits", "Session"):
        assert f"class {name}(" in text
    for name in ("SparseSession", "SavingSession", "AppBackend", "FittingBackend", "LibraryBackend", "PlanningBackend"):
        assert f"class {name}(" in text
    assert "  StorageForm.copies: int = 1" in text
    for method in ("probe", "claim", "compile", "check", "load"):
        assert f"  Backend.{method}(self" in text
    for hook in ("transom_backends", "transom_ops", "transom_choose"):
        assert f"  Specs.{hook}(self" in text
    assert "{'firstresult': True}" in text
    assert "  Device.kind: Literal['cpu', 'cuda', 'gpu', 'npu', 'remote']" in text.replace('"', "'")


CHANGES = {
    "a new field": ("    cores: int = 0\n", "    cores: int = 0\n    clock: int = 0\n"),
    "a field of another type": ("    cores: int = 0\n", "    cores: float = 0\n"),
    "another default": ("    cores: int = 0\n", "    cores: int = 1\n"),
    "a new allowed value": ('"fallback", "generic"', '"worst", "fallback", "generic"'),
    "a new method": ("    def close(self)", "    def pause(self) -> None: ...\n\n    def close(self)"),
    "another argument": ("def new_state(self)", "def new_state(self, seed: int)"),
    "another hook argument": ("def transom_ops(self)", "def transom_ops(self, domain: str)"),
    "another hook option": ("@hookspec(firstresult=True)", "@hookspec"),
    "another entry-point group": ('"transom.backends"', '"transom.engines"'),
    "another result": ("-> Verdict:", "-> bool:"),
    "a new optional method": (
        "    def machine_of(self",
        "    def pages_of(self) -> int: ...\n\n    def machine_of(self",
    ),
    "another field of a form": ("    copies: int = 1\n", "    copies: float = 1\n"),
    "another argument of an optional method": ("def save(self, state: State)", "def save(self, states: State)"),
}


@pytest.mark.parametrize("change", CHANGES, ids=[change.replace(" ", "-") for change in CHANGES])
def test_a_change_that_a_plugin_could_notice_changes_the_digest(change: str) -> None:
    assert digest(_edited(*CHANGES[change])) != digest()


def test_words_do_not_change_the_digest() -> None:
    assert digest(_edited("One piece of hardware", "A piece of hardware")) == digest()
    assert digest(_edited("Bytes in memory for each byte", "Bytes of memory for each byte")) == digest()


def test_names_that_were_in_the_contract_before_are_still_found_there() -> None:
    for name in ("AppBackend", "SavingSession", "SparseSession"):
        assert getattr(contract, name) is getattr(contract_optional, name)
    assert not hasattr(contract, "PlanningBackend")


def _edited(old: str, new: str) -> list[Any]:
    """The modules of the contract, the first one that has the text with that text changed, under its own name."""
    import sys
    import types

    home = next(module for module in MODULES if old in inspect.getsource(module))
    module = types.ModuleType(home.__name__)
    sys.modules[home.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(inspect.getsource(home).replace(old, new, 1), home.__file__, "exec"), module.__dict__)
    finally:
        sys.modules[home.__name__] = home
    return [module if one is home else one for one in MODULES]


if __name__ == "__main__":
    print("\n".join(described()))
    print(f'\n    {contract.API_VERSION}: "{digest()}",')
