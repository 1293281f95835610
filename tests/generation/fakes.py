"""A fake decoder, tokenizer and chat template for tests of generation: tiny, deterministic, strict, breakable.

`FakeSession` computes logits from a hash of all tokens before, so that a wrong, lost or doubled token changes all that
comes after. It checks every promise that the host makes to a session: limits, static shapes, one thread at a time, no
state used after it was freed; `violations` holds what was broken even where the host swallowed the error.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from transom.contract import Device, Limits, OutOfPages, Work
from transom.generation.model import Loaded
from transom.generation.report import Report
from transom.signature import Decoder, LayerCache
from transom.text import ChatTemplate, GenerationDefaults

MASK = (1 << 64) - 1


def next_hash(state: int, token: int) -> int:
    value = (state ^ (token + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def logits_after(tokens: Iterable[int], vocabulary: int, spread: float = 3.0) -> np.ndarray:
    """float32 [vocabulary]: the fake model's logits after these tokens."""
    state = 1
    for token in tokens:
        state = next_hash(state, token)
    return row_of(state, vocabulary, spread)


def row_of(state: int, vocabulary: int, spread: float) -> np.ndarray:
    return (np.random.default_rng(state).standard_normal(vocabulary) * spread).astype(np.float32)


class Page:
    """A page of the pool, shared by the states that hold it."""

    def __init__(self) -> None:
        self.holders = 0


class FakeState:
    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.tokens: list[int] = []
        self.pages: list[Page] = []
        self.freed = False
        session.live.add(self)

    @property
    def length(self) -> int:
        self._use()
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        self._use()
        return 8 * len(self.tokens)

    def fork(self, length: int) -> FakeState:
        with self.session.serialized():
            self._use()
            if length > len(self.tokens):
                raise ValueError("longer than the state")
            size = self.session.limits.page_tokens
            partial = bool(size and length % size)
            if partial and not self.session.free_pages:
                raise OutOfPages("no page for the copy")
            other = FakeState(self.session)
            other.tokens = self.tokens[:length]
            if size:
                other.pages = self.pages[: length // size] + ([Page()] if partial else [])
                for page in other.pages:
                    page.holders += 1
                self.session.free_pages -= partial
            self.session.forks += 1
            return other

    def truncate(self, length: int) -> None:
        with self.session.serialized():
            self._use()
            if length > len(self.tokens):
                raise ValueError("longer than the state")
            del self.tokens[length:]
            if self.session.limits.page_tokens:
                self._drop(math.ceil(length / self.session.limits.page_tokens))

    def free(self) -> None:
        with self.session.serialized():
            if not self.freed:
                self._drop(0)
            self.freed = True
            self.session.live.discard(self)

    def _drop(self, keep: int) -> None:
        for page in self.pages[keep:]:
            page.holders -= 1
            self.session.free_pages += page.holders == 0
        del self.pages[keep:]

    def _use(self) -> None:
        if self.freed:
            self.session.broken("a state was used after it was freed")
            raise RuntimeError("this state was freed")


class FakeSession:
    """A contract.Session over `logits_after`.

    Args:
        before: called with the works of each step, before anything changes; may raise, sleep or block.
        after: called when a step has changed the states, before its outputs are returned; may raise KeyboardInterrupt.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 61,
        context: int = 512,
        max_sequences: int = 8,
        max_tokens: int = 64,
        page_tokens: int = 0,
        pages: int = 0,
        token_classes: tuple[int, ...] = (),
        spread: float = 3.0,
        before: Callable[[Sequence[Work]], None] | None = None,
        after: Callable[[Sequence[Work]], None] | None = None,
        step_seconds: float = 0.0,
    ) -> None:
        self.limits = Limits(max_sequences, max_tokens, context, page_tokens, token_classes)
        self.vocabulary = vocabulary
        self.spread = spread
        self.before, self.after, self.step_seconds = before, after, step_seconds
        self.total_pages = self.free_pages = pages
        self.live: set[FakeState] = set()
        self.steps: list[list[tuple[int, str]]] = []
        """(tokens, logits) of each work item of each successful step."""
        self.forks = 0
        self.refused_steps = 0
        self.closed = 0
        self.violations: list[str] = []
        self._busy = threading.Lock()
        self._owner: int | None = None

    def broken(self, what: str) -> None:
        self.violations.append(what)

    def serialized(self) -> _Serialized:
        return _Serialized(self)

    def pages(self) -> tuple[int, int]:
        with self.serialized():
            return (self.total_pages, self.free_pages) if self.limits.page_tokens else (0, 0)

    def new_state(self) -> FakeState:
        with self.serialized():
            self._open()
            return FakeState(self)

    def step(self, work: Sequence[Work]) -> list[Any]:
        with self.serialized():
            self._open()
            self._check(work)
            if self.before is not None:
                self.before(work)
            if self.step_seconds:
                time.sleep(self.step_seconds)
            self._take_pages(work)
            outputs = [self._run(w) for w in work]
            self.steps.append([(len(w.tokens), w.logits) for w in work])
            if self.after is not None:
                self.after(work)
            return outputs

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        with self.serialized():
            self._open()
            return {"sum": sum(np.asarray(v).astype(np.float64).sum() for v in inputs.values())}

    def close(self) -> None:
        with self.serialized():
            self.closed += 1

    def _open(self) -> None:
        if self.closed:
            self.broken("the session was used after close")
            raise RuntimeError("closed")

    def _check(self, work: Sequence[Work]) -> None:
        limits = self.limits
        widths = [len(w.tokens) for w in work]
        problems = [
            not work and "an empty step",
            len(work) > limits.max_sequences and "too many sequences",
            sum(widths) > limits.max_tokens and "too many tokens",
            min(widths, default=1) < 1 and "a work without tokens",
            bool(limits.token_classes) and any(w not in limits.token_classes for w in widths) and "not a static shape",
            len({id(w.state) for w in work}) < len(work) and "a state used twice",
            any(not 0 <= t < self.vocabulary for w in work for t in w.tokens) and "a token outside the vocabulary",
            any(w.state.length + len(w.tokens) > limits.context for w in work) and "beyond the context",
        ]
        for problem in problems:
            if problem:
                self.broken(problem)
                raise ValueError(problem)

    def _take_pages(self, work: Sequence[Work]) -> None:
        size = self.limits.page_tokens
        if not size:
            return
        needs = []
        for w in work:
            state: Any = w.state
            length = len(state.tokens)
            shared = bool(length % size and state.pages[-1].holders > 1)  # copy before writing
            needs.append((state, math.ceil((length + len(w.tokens)) / size) - len(state.pages), shared))
        if sum(grow + shared for _, grow, shared in needs) > self.free_pages:
            self.refused_steps += 1
            raise OutOfPages("the pool is full")
        for state, grow, shared in needs:
            if shared:
                state.pages[-1].holders -= 1
                state.pages[-1] = Page()
                state.pages[-1].holders = 1
                self.free_pages -= 1
            for _ in range(grow):
                page = Page()
                page.holders = 1
                state.pages.append(page)
                self.free_pages -= 1

    def _run(self, work: Work) -> Any:
        state: Any = work.state
        value = 1
        for token in state.tokens:
            value = next_hash(value, token)
        rows = []
        for i, token in enumerate(work.tokens):
            value = next_hash(value, token)
            if work.logits == "all" or (work.logits == "last" and i == len(work.tokens) - 1):
                rows.append(row_of(value, self.vocabulary, self.spread))
        state.tokens.extend(work.tokens)
        if work.logits == "none":
            return None
        full = np.stack(rows) if work.logits == "all" else rows[0]
        if not work.top_k:
            return full
        ids = np.argsort(-full, axis=-1, kind="stable")[..., : work.top_k].astype(np.int64)
        return ids, np.take_along_axis(full, ids, axis=-1)


class _Serialized:
    """Detects concurrent calls from two threads."""

    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.nested = False

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self.session._owner == me:
            self.nested = True
        elif not self.session._busy.acquire(blocking=False):
            self.session.broken("two threads used the session at once")
            raise RuntimeError("two threads used the session at once")
        else:
            self.session._owner = me

    def __exit__(self, *_: object) -> None:
        if not self.nested:
            self.session._owner = None
            self.session._busy.release()


BOS, EOS, END_OF_TURN = 256, 257, 258
BYTE_VOCABULARY = 259
_SPECIAL = {"<s>": BOS, "</s>": EOS, "<|im_end|>": END_OF_TURN}


class ByteTokenizer:
    """One token per byte, and three special ones."""

    bos_id, eos_id = BOS, EOS
    vocabulary_size = BYTE_VOCABULARY
    special_ids = frozenset(_SPECIAL.values())

    def __init__(self, *, adds_bos: bool = False) -> None:
        self.adds_bos = adds_bos

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        ids = [BOS] if add_special and self.adds_bos else []
        while text:
            name = next((n for n in _SPECIAL if parse_special and text.startswith(n)), None)
            ids += [_SPECIAL[name]] if name else list(text[0].encode())
            text = text[len(name or text[0]) :]
        return ids

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else next((n.encode() for n, i in _SPECIAL.items() if i == token), b"")

    def token_to_id(self, token: str) -> int | None:
        return _SPECIAL.get(token)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        return b"".join(b"" if skip_special and i in self.special_ids else self.token_bytes(i) for i in ids).decode(
            "utf-8", "replace"
        )

    def stream(self, *, skip_special: bool = True, continues: bool = False) -> Any:
        from transom.text.detokenizer import ByteDetokenizer

        return ByteDetokenizer({i: self.token_bytes(i) for i in range(BYTE_VOCABULARY)}, self.special_ids)


class Script:
    """Logits that make a `FakeSession` generate given tokens after a prompt, for any split into steps."""

    def __init__(self, session: FakeSession, prompt: Sequence[int], says: Sequence[int]) -> None:
        self.prompt, self.says = list(prompt), list(says)
        inner = session._run

        def run(work: Work) -> Any:
            start = len(work.state.tokens)  # type: ignore[attr-defined]
            output = inner(Work(work.state, work.tokens, work.logits))
            if output is None:
                return None
            rows = output if output.ndim == 2 else output[None]
            first = start if work.logits == "all" else start + len(work.tokens) - 1
            for i, row in enumerate(rows):
                place = first + i + 1 - len(self.prompt)
                if 0 <= place < len(self.says):
                    row[self.says[place]] = 100.0
            if not work.top_k:
                return output
            ids = np.argsort(-output, axis=-1, kind="stable")[..., : work.top_k].astype(np.int64)
            return ids, np.take_along_axis(output, ids, axis=-1)

        session._run = run  # type: ignore[method-assign]


CPU = Device("cpu", "cpu", "x86_64", 2**34, name="Test CPU")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def fake_decoder(vocabulary: int, context: int = 512) -> Decoder:
    return Decoder("fake", vocabulary, 8, context, (LayerCache(1, 1, 8, 8),))


def loaded(session: FakeSession, *, text: bool = True, **changes: Any) -> Loaded:
    """A `Loaded` with a fake session; with text, its vocabulary must be BYTE_VOCABULARY."""
    made = Loaded(
        session=session,
        report=Report("fake-model", "fake", CPU, "it is the only one"),
        decoder=fake_decoder(session.vocabulary, session.limits.context),
        tokenizer=ByteTokenizer() if text else None,  # type: ignore[arg-type]
        chat_template=ChatTemplate(TEMPLATE) if text else None,
        defaults=GenerationDefaults(eos_ids=(EOS,), bos_id=BOS) if text else GenerationDefaults(),
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def text_session(**options: Any) -> FakeSession:
    return FakeSession(**{"vocabulary": BYTE_VOCABULARY, **options})
