"""Nothing in the tests is drawn from an unknown seed, and each module that draws says why no draw fails honestly."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FIXTURES = {"seed", "rng", "dice", "shared_rng"}
STATEMENT = "Draws: "
"""Begins the line of a module's docstring that says why no draw can fail where nothing is wrong, or which rule draws
again."""
UNSEEDED = {"random.Random", "Random", "np.random.default_rng", "default_rng", "np.random.RandomState"}
"""Generators that take a fresh seed where they are given none."""
FORBIDDEN = {"random.SystemRandom", "SystemRandom", "os.urandom", "uuid.uuid4", "torch.seed", "hash"}
OF_TORCH = {"rand", "randn", "randint", "randperm", "normal", "rand_like", "randn_like"}
GENERATORS = {"random.Random", "np.random.default_rng", "np.random.Generator", "np.random.SeedSequence"}


@cache
def modules() -> dict[str, ast.Module]:
    paths = [p for p in sorted(TESTS.rglob("*.py")) if p != TESTS / "draws.py"]
    return {str(p.relative_to(TESTS)): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def dotted(node: ast.expr) -> str:
    """`np.random.default_rng` as it is written; nothing for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def draws(module: ast.Module) -> bool:
    """Whether a module has a test or a fixture that draws something."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and FIXTURES & {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}:
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "hypothesis":
            return True
        if isinstance(node, ast.ClassDef) and "BackendConformance" in map(dotted, node.bases):
            return True
    return False


def unseeded(module: ast.Module) -> Iterator[str]:
    """Each place that takes random numbers from nowhere."""
    imports = {a.name for node in ast.walk(module) if isinstance(node, ast.Import) for a in node.names}
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            if "secrets" in names:
                yield f"{node.lineno}: secrets"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        owner, _, function = name.rpartition(".")
        bare = not node.args and not node.keywords
        of_the_process = owner == "np.random" or (owner == "random" and "random" in imports)
        if (
            (name in UNSEEDED and bare)
            or name in FORBIDDEN
            or (of_the_process and name not in GENERATORS)
            or (owner == "torch" and function in OF_TORCH and not any(k.arg == "generator" for k in node.keywords))
        ):
            yield f"{node.lineno}: {name}"


def test_nothing_is_drawn_from_an_unknown_seed() -> None:
    found = [f"tests/{path}:{place}" for path, module in modules().items() for place in unseeded(module)]
    assert not found, "use the fixtures `rng`, `dice`, `seed` or `shared_rng`:\n" + "\n".join(found)


def test_each_module_that_draws_says_why_no_draw_can_fail() -> None:
    silent = [
        f"tests/{path}"
        for path, module in modules().items()
        if Path(path).name.startswith("test_") and draws(module)
        and not any(line.startswith(STATEMENT) for line in (ast.get_docstring(module) or "").splitlines())
    ]  # fmt: skip
    assert not silent, f"their docstrings have no line that begins with {STATEMENT!r}:\n" + "\n".join(silent)


@pytest.mark.parametrize(
    "line",
    ["np.random.default_rng()", "random.Random()", "import secrets", "import random; random.choice([1])",
     "np.random.rand(3)", "os.urandom(3)", "torch.randn(3)", "random.SystemRandom()"],
)  # fmt: skip
def test_unseeded_numbers_are_seen(line: str) -> None:
    assert list(unseeded(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    ["np.random.default_rng(3)", "random.Random(seed)", "rng.random()", "torch.randn(3, generator=g)"],
)  # fmt: skip
def test_seeded_numbers_are_let_be(line: str) -> None:
    assert not list(unseeded(ast.parse(line)))
