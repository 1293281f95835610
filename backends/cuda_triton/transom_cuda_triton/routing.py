"""The routing of dynamic sparse attention on the device: the kernels that one layer's routing launches, in order.

It selects the same keys as `transom.ops.sparse_routing`, for nodes of 8 keys and the score "rms". Nothing waits for the
host: grids depend on the shapes of arrays alone, so that a recorded CUDA graph is valid for all lengths.

Imports neither triton nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transom.ops.sparse_routing import BLOCK, COLUMN_ROWS, DENSE_ABOVE
from transom.sparsity import LayerSparsity, Sparsity
from transom_cuda_triton.tiles import parts
from transom_cuda_triton.variants import KernelVariant, Launcher

NODE = 8
MOST_COLUMNS = 64
FINEST = 16
"""Keys per unit in the attention kernels."""
SPLITS = 32
"""Maximum number of splits of a block's keys."""
UNIT_WIDTH, KEY_WIDTH = 1024, 4096
"""Units and keys that a selection kernel processes at once."""
REMEMBER_PART = 1024

Shape = tuple[tuple[int, ...], str]
"""Shape of an array, and Triton's type of its elements."""


@dataclass(frozen=True)
class Rule:
    """A policy as kernel arguments, the same for all blocks of a launch."""

    stride: int
    local: int
    most_columns: int
    dense_below: int
    top_k: int
    min_density: float
    max_density: float
    may_fall: int
    """1 if a block that would read more than 0.6 of its keys reads all of them."""

    @classmethod
    def of(cls, policy: Sparsity) -> Rule:
        """Raises:
        ValueError: the kernels do not support the policy.
        """
        if policy.node != NODE or policy.score != "rms" or policy.columns > MOST_COLUMNS or policy.unit < FINEST:
            raise ValueError(f"no kernels for the sparsity policy {policy}")
        return cls(
            BLOCK // policy.rows, -(-policy.local_window // BLOCK), policy.columns, policy.dense_below, policy.top_k,
            policy.min_density, policy.max_density, int(policy.max_density * DENSE_ABOVE[1] > DENSE_ABOVE[0]),
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Maximum number of sampled queries per block."""
        return BLOCK // self.stride


def coverages(layer: LayerSparsity, kv_heads: int) -> list[float]:
    """COVERAGE: -1 for a dense head."""
    return [-1.0 if layer.dense_head(head) else layer.coverage(head) for head in range(kv_heads)]


def splits_of(blocks: int, kv_heads: int, most_keys: int, processors: int) -> int:
    """Number of splits of each block's keys, for about two programs per multiprocessor."""
    wanted = -(-2 * processors // max(1, blocks * kv_heads))
    return max(1, min(SPLITS, wanted, -(-most_keys // (BLOCK * NODE)) + 2))


def _tile(rows: int) -> int:
    """Rows per program: a size for tensor cores, at most 64."""
    return min(64, max(16, 1 << (rows - 1).bit_length()))


@dataclass(frozen=True)
class Routing:
    """The routing of layers of one shape."""

    kv_heads: int
    group: int
    head_dim: int
    scale: float
    softcap: float
    window: int
    with_sinks: bool
    dtype: str
    """Triton's type of queries, keys and nodes: "fp16", "bf16" or "fp32"."""
    unit: int
    plain: bool = False
    """Whether products run on CUDA cores (sm_70), with the smallest tiles: larger ones do not fit there."""

    # arrays -----------------------------------------------------------------------------------------------------------
    def nodes(self, pages: int, slots: int) -> dict[str, Shape]:
        """Node arrays of each layer, beside its cache."""
        rows = (pages + MOST_COLUMNS // NODE * slots, self.kv_heads, BLOCK // NODE)
        vectors = (*rows, self.head_dim)
        return {"MEANS": (vectors, self.dtype), "VARIANCES": (vectors, self.dtype), "COUNTS": (rows, "i32")}

    def kept(self, slots: int, most_pages: int) -> dict[str, Shape]:
        """Arrays that each layer keeps for slots between steps; all but RING are initially -1.

        Args:
            most_pages: pages of the longest sequence.
        """
        own = (slots, self.kv_heads, MOST_COLUMNS)
        return {
            "COLUMNS": (own, "i32"), "PATCHES": (own, "i32"),
            "SIDES": ((slots, self.kv_heads, most_pages * (BLOCK // NODE)), "i8"),
            "RING": ((slots, COLUMN_ROWS, self.kv_heads * self.group, self.head_dim), self.dtype),
        }  # fmt: skip

    def scratch(
        self, blocks: int, choosers: int, most_pages: int, rows: int, splits: int, *, decoding: bool
    ) -> dict[str, Shape]:
        """Arrays between the kernels of one step; layers may share them.

        Args:
            rows: maximum sampled queries per block: `Rule.rows`, or 1 if all blocks are single queries.
            splits: the larger of `splits` and `column_splits` of `run`.
        """
        own, column_own = (blocks, self.kv_heads), (choosers, self.kv_heads)
        tile = self._rows(decoding)
        width = -(-rows * self.group // tile) * tile
        column_width = self._column_tiles * self._column_rows
        units = most_pages * (BLOCK // self.unit)
        kept = (*own, self.group, units) if decoding else (1,)
        return {
            "STATS": ((*own, splits, 4, width), "fp32"), "NORMS": ((*own, width), "fp32"), "MASSES": (kept, "fp32"),
            "SHARES": ((*own, 2), "fp32"), "SCORES": ((*own, units), "fp32"),
            "COLUMN_STATS": ((*column_own, splits, 2, column_width), "fp32"),
            "COLUMN_NORMS": ((*column_own, column_width), "fp32"),
            "MASS": ((*column_own, most_pages * BLOCK), "fp32"),
        }  # fmt: skip

    def chosen(self, blocks: int, most_pages: int) -> dict[str, Shape]:
        """Output arrays of the selection."""
        own = (blocks, self.kv_heads)
        return {
            "FAR": ((*own, most_pages * (BLOCK // FINEST)), "i32"), "BLOCK_COLUMNS": ((*own, MOST_COLUMNS), "i32"),
            **dict.fromkeys(("FAR_COUNT", "NEAR", "READ", "SEEN"), (own, "i32")), "FLAG": ((1,), "i32"),
        }  # fmt: skip

    # kernels ----------------------------------------------------------------------------------------------------------
    def variants(self) -> list[KernelVariant]:
        """All variants that `run` may launch."""
        steps = [step for decoding in (False, True) for step in self._scores(decoding).values()]
        return list(dict.fromkeys([*self._columns().values(), self._remember(), *steps, self._choose()]))

    def run(
        self,
        launch: Launcher,
        arrays: Mapping[str, Any],
        rule: Rule,
        *,
        decoding: bool,
        splits: int,
        column_splits: int = SPLITS,
    ) -> None:
        """Select the keys that the query blocks of a step read, once its keys are in the cache.

        Args:
            arrays: those of `nodes`, `kept`, `scratch` and `chosen`, and Q [tokens, kv_heads * group, head_dim] or
                flat; K; PAGES, BLOCKS, SLOTS; COVERAGE; SINKS if there are any; CHOOSERS, SAMPLED, REMEMBERED, which
                may be empty or contain -1.
            rule: the rule of all sequences of the step.
            decoding: whether every block is a single query.
            splits: splits of each block's keys, at most `SPLITS`.
            column_splits: the same for the sequences that select columns.
        """
        blocks, choosers = arrays["BLOCKS"].shape[0], arrays["CHOOSERS"].shape[0]
        remembered = arrays["REMEMBERED"].shape[0]
        values = {**arrays, **self._numbers(arrays, rule, splits, column_splits)}

        def start(variant: KernelVariant, *grid: int) -> None:
            launch(variant, grid, {name: values[name] for name, _ in variant.types})

        if choosers and rule.most_columns:
            columns = self._columns()
            start(columns["weigh_rows"], choosers, self.kv_heads, column_splits * self._column_tiles)
            start(columns["merge_columns"], choosers, self.kv_heads)
            start(columns["sum_mass"], choosers, self.kv_heads, column_splits)
            start(columns["choose_columns"], choosers, self.kv_heads)
            start(columns["patch_nodes"], choosers, self.kv_heads, MOST_COLUMNS // NODE)
        if remembered:
            width = self.kv_heads * self.group * self.head_dim
            start(self._remember(), remembered, -(-width // REMEMBER_PART))
        if not blocks:
            return
        scores = self._scores(decoding)
        tiles = -(-(1 if decoding else rule.rows) * self.group // self._rows(decoding))
        start(scores["measure_rows"], blocks, self.kv_heads, splits * tiles)
        start(scores["merge_rows"], blocks, self.kv_heads)
        start(scores["score_units"], blocks, self.kv_heads, splits)
        start(self._choose(), blocks, self.kv_heads)

    # variants ---------------------------------------------------------------------------------------------------------
    def _rows(self, decoding: bool) -> int:
        most = 16 if self.plain else 32 if self._wide else 64
        return min(most, _tile(self.group if decoding else 64))

    @property
    def _wide(self) -> bool:
        """Whether nodes are too wide for two tiles of them in shared memory."""
        return self.head_dim * (4 if self.dtype == "fp32" else 2) > 384

    @property
    def _column_rows(self) -> int:
        return 16 if self.plain else _tile(COLUMN_ROWS * self.group)

    @property
    def _column_tiles(self) -> int:
        return -(-COLUMN_ROWS * self.group // self._column_rows)

    def _numbers(self, arrays: Mapping[str, Any], rule: Rule, splits: int, column_splits: int) -> dict[str, Any]:
        q, k = arrays["Q"], arrays["K"]
        return {
            "factor": self.scale, "cap": self.softcap, "window": self.window, "stride": rule.stride,
            "local": rule.local, "most_columns": rule.most_columns, "dense_below": rule.dense_below,
            "top_k": rule.top_k, "min_density": rule.min_density, "max_density": rule.max_density,
            "may_fall": rule.may_fall, "cache_pages": k.shape[0], "q_token": q.stride(0), "k_page": k.stride(0),
            "k_head": k.stride(1), "most_pages": arrays["PAGES"].shape[1], "most_nodes": arrays["SIDES"].shape[2],
            "most_units": arrays["SCORES"].shape[2], "most_keys": arrays["MASS"].shape[2],
            "most_far": arrays["FAR"].shape[2], "row_width": arrays["NORMS"].shape[2], "splits": splits,
            "column_splits": column_splits,
        }  # fmt: skip

    def _variant(
        self, kernel: str, arguments: str, constants: Mapping[str, Any], warps: int = 4, stages: int = 2
    ) -> KernelVariant:
        """A variant of a kernel; `arguments` are the names of its non-constant arguments."""
        own, names = dict(constants), arguments.split()
        if "SINKS" in names and not self.with_sinks:
            names.remove("SINKS")
            own["SINKS"] = None
        return KernelVariant.of(kernel, {name: self._type(name) for name in names}, own, warps, stages)

    def _type(self, name: str) -> str:
        if name in _FLOATS:
            return "fp32"
        if not name.isupper():
            return "i32"
        if name in _CACHE:
            return f"*{self.dtype}"
        return "*i8" if name == "SIDES" else "*fp32" if name in _FLOAT_ARRAYS else "*i32"

    @property
    def _head(self) -> dict[str, Any]:
        head, rest = parts(self.head_dim)
        return {"GROUP": self.group, "HEAD": head, "HEAD_REST": rest}

    @property
    def _halves(self) -> dict[str, Any]:
        """Heads in two parts, whose separate products need fewer registers."""
        half, rest = parts(self.head_dim, 64 if self.head_dim <= 128 else 128)
        return {"HEAD": half, "HEAD_REST": rest}

    @property
    def _capped(self) -> dict[str, Any]:
        return {"CAPPED": self.softcap > 0, "WINDOWED": self.window > 0}

    def _columns(self) -> dict[str, KernelVariant]:
        windowed = {"WINDOWED": self.window > 0}
        rows = {"ROWS": self._column_rows}
        merged = {"GROUP": self.group, "SPLITS": SPLITS, "WITH_SINKS": self.with_sinks, **rows, **windowed}
        head = {name: self._head[name] for name in ("HEAD", "HEAD_REST")}
        products = {**self._head, **self._capped, **rows}
        return {
            "weigh_rows": self._variant("columns.weigh_rows", _WEIGH_ROWS, products, 4),
            "merge_columns": self._variant("columns.merge_columns", _MERGE_COLUMNS, merged, 4),
            "sum_mass": self._variant("columns.sum_mass", _SUM_MASS, products, 4),
            "choose_columns": self._variant(
                "columns.choose_columns", _CHOOSE_COLUMNS, {"WIDTH": KEY_WIDTH, **windowed}, 8
            ),
            "patch_nodes": self._variant("nodes.patch_nodes", _PATCH_NODES, head, 4),
        }

    def _remember(self) -> KernelVariant:
        width = {"WIDTH": self.kv_heads * self.group * self.head_dim}
        return self._variant("remember.remember", "Q RING REMEMBERED q_token", width, 4)

    def _scores(self, decoding: bool) -> dict[str, KernelVariant]:
        rows = {"ROWS": self._rows(decoding)}
        head = {**self._head, **self._halves} if self.plain else self._head
        masses = {**head, **self._capped, **rows, "UNIT": self.unit, "KEPT": decoding}
        merged = {"GROUP": self.group, "SPLITS": SPLITS, "WITH_SINKS": self.with_sinks, **rows}
        # Warps and stages that spill no registers.
        cut = (4, 3 if self.head_dim > 64 and not self._wide else 2) if decoding else (8, 1 if self._wide else 2)
        cut = (8, 1) if self.plain else cut
        return {
            "measure_rows": self._variant("scores.measure_rows", _MEASURE_ROWS, masses, *cut),
            "merge_rows": self._variant("scores.merge_rows", _MERGE_ROWS, merged | {"WINDOWED": self.window > 0}, 4),
            "score_units": self._variant("scores.score_units", _SCORE_UNITS, masses, *cut),
        }

    def _choose(self) -> KernelVariant:
        constants = {"UNIT": self.unit, "WIDTH": UNIT_WIDTH, "WINDOWED": self.window > 0}
        return self._variant("choose.choose_units", _CHOOSE_UNITS, constants, 8)


_CACHE = frozenset(("Q", "K", "RING", "MEANS", "VARIANCES"))
_FLOATS = frozenset(("factor", "cap", "min_density", "max_density"))
_FLOAT_ARRAYS = frozenset(
    ("COVERAGE", "SINKS", "COLUMN_STATS", "COLUMN_NORMS", "MASS", "STATS", "MASSES", "NORMS", "SHARES", "SCORES")
)
_WEIGH_ROWS = """Q K RING PAGES SLOTS COVERAGE CHOOSERS SAMPLED COLUMN_STATS factor cap window local q_token k_page
k_head most_pages column_splits"""
_MERGE_COLUMNS = "SAMPLED CHOOSERS COVERAGE SINKS COLUMN_STATS COLUMN_NORMS local window column_splits"
_SUM_MASS = """Q K RING PAGES SLOTS COVERAGE CHOOSERS SAMPLED COLUMN_NORMS MASS factor cap window local q_token k_page
k_head most_pages most_keys"""
_CHOOSE_COLUMNS = """SLOTS COVERAGE CHOOSERS SAMPLED MASS COLUMNS PATCHES SIDES FLAG local window most_columns most_keys
most_nodes"""
_PATCH_NODES = """K MEANS VARIANCES COUNTS PAGES SLOTS CHOOSERS COVERAGE COLUMNS PATCHES SIDES k_page k_head most_pages
most_nodes cache_pages"""
_MEASURE_ROWS = """Q K MEANS VARIANCES COUNTS BLOCKS PAGES SLOTS COVERAGE COLUMNS SIDES STATS MASSES factor cap window
stride local most_columns dense_below cache_pages q_token k_page k_head most_pages most_nodes most_units row_width
splits"""
_MERGE_ROWS = """BLOCKS SLOTS COVERAGE SINKS STATS NORMS SHARES window stride local dense_below row_width splits"""
_SCORE_UNITS = """Q MEANS VARIANCES COUNTS BLOCKS PAGES SLOTS COVERAGE SIDES MASSES NORMS SCORES factor cap window
stride local most_columns dense_below cache_pages q_token most_pages most_nodes most_units row_width"""
_CHOOSE_UNITS = """SCORES SHARES BLOCKS SLOTS COVERAGE COLUMNS FAR FAR_COUNT BLOCK_COLUMNS NEAR READ SEEN FLAG window
local most_columns dense_below top_k min_density max_density may_fall most_units most_far"""
