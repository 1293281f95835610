"""The kit as a pytest class, for the repositories of plugin authors."""

from __future__ import annotations

import fnmatch
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest

from transom.contract import Backend, Device
from transom.testing.bench import Bench
from transom.testing.checks import all_checks
from transom.testing.checks.check import run_check
from transom.testing.result import CheckResult
from transom.testing.runner import offered

_CHECKS = {check.name: check for check in all_checks()}


class BackendConformance:
    """Inherit from this class and set the backend; pytest then checks it against the contract and the reference::

        from transom.testing import BackendConformance
        from my_plugin import MyBackend

        class TestMyBackend(BackendConformance):
            backend = MyBackend()
            may_refuse = ["operator.Attention", "logits.sinks"]

    Every check is a test of its own, such as `test_conforms[state.copy_on_write]`; run one with `-k`. A check passes,
    fails, or is refused by the backend with a reason. A refusal fails the test unless `may_refuse` names the check. A
    check in `may_refuse` that is no longer refused fails too, so the list is exactly what the plugin does not support.

    Attributes:
        backend: the backend. Its class must be importable by name, because two checks pass it to a fresh process.
        device: the device to run on; None: the first device of the machine that the backend offers to use.
        options: options for `claim`, `compile` and `load` that replace the defaults.
        precision: the compute precision behind exact claims, `"float32"`, `"float16"` or `"bfloat16"`; sets the
            tolerances.
        may_refuse: names or patterns of checks that may be refused.
        seed: the seed of all random inputs; None: a fresh one, printed when a test fails. Set it to repeat a failure.
    """

    backend: ClassVar[Backend]
    device: ClassVar[Device | None] = None
    options: ClassVar[Mapping[str, object]] = {}
    precision: ClassVar[str] = "float32"
    may_refuse: ClassVar[Sequence[str]] = ()
    seed: ClassVar[int | None] = None

    _bench: ClassVar[Bench | None] = None
    _results: ClassVar[dict[str, CheckResult]] = {}

    @classmethod
    def setup_class(cls) -> None:
        cls._results = {}

    @classmethod
    def teardown_class(cls) -> None:
        if cls._bench is not None:
            cls._bench.__exit__()
            cls._bench = None

    @classmethod
    def _shared_bench(cls) -> Bench:
        """The bench that the checks share. A new one is made after `seed` has changed."""
        if cls._bench is None or cls.seed not in (None, cls._bench.seed):
            cls.teardown_class()
            seed = secrets.randbits(32) if cls.seed is None else cls.seed
            device = cls.device or offered(cls.backend)
            cls._bench = Bench(cls.backend, device, seed=seed, precision=cls.precision, options=cls.options)
        return cls._bench

    @pytest.mark.parametrize("name", list(_CHECKS))
    def test_conforms(self, name: str, record_property: Any) -> None:
        """One requirement of the contract. The message of a failure ends with the requirement and the seed."""
        bench = self._shared_bench()
        result = run_check(_CHECKS[name], bench)
        self._results[name] = result
        if result.error is not None:
            record_property("normalized_error", result.error)
        demand = f"{_CHECKS[name].doc}\n(seed = {bench.seed})"
        lines = "".join(f"\n  {p.label}: {p.reason}" for p in result.parts if p.outcome == result.outcome)
        if result.outcome == "failed":
            pytest.fail(f"{result.reason}{lines}\nThe contract: {demand}", pytrace=False)
        if result.outcome == "refused":
            record_property("refused", result.reason)
            if not self._expected(name):
                hint = f"If this is intended, add {name!r} to may_refuse."
                pytest.fail(f"refused: {result.reason}{lines}\n{hint}\nThe contract: {demand}", pytrace=False)

    def test_list_of_refusals_is_true(self) -> None:
        """Every entry of may_refuse names a check that is refused. Only entries whose checks all ran are tested."""
        for pattern in self.may_refuse:
            named = [n for n in _CHECKS if fnmatch.fnmatchcase(n, pattern)]
            if not named:
                pytest.fail(f"may_refuse names {pattern!r}, but there is no such check", pytrace=False)
            run = [self._results[n] for n in named if n in self._results]
            if len(run) == len(named) and not any(r.outcome == "refused" for r in run):
                pytest.fail(f"may_refuse names {pattern!r}, which is no longer refused: remove it", pytrace=False)

    def _expected(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.may_refuse)
