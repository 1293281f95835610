"""The contract session over slots: a sequence holds one slot, and can be saved and restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transom.contract import State, Tensor
from transom.sessions import PagedSession, PagedState, saved_array
from transom.signature import Decoder
from transom_tensorrt.engine import SlotEngine
from transom_tensorrt.executing import Array, rows_of, stored
from transom_tensorrt.network import CHUNK


class SlotSession(PagedSession):
    """A `transom.contract_optional.SavingSession`.

    Args:
        context: tokens that one state may hold; at most the network's context.
    """

    def __init__(self, engine: SlotEngine, decoder: Decoder, *, context: int) -> None:
        self._slots = engine
        super().__init__(
            engine, decoder, context=context, pages=engine.slots, max_sequences=engine.slots, max_tokens=CHUNK
        )

    def save(self, state: State) -> Mapping[str, Tensor]:
        """The kept tensors of a state by input name, [heads, rows, columns]: float32, or raw bits of 16-bit floats."""
        self._need_open()
        pages = self._own(state).table.pages
        self._warming.join()
        return self._slots.read(pages[0] if pages else 0, state.length)

    def restore(self, length: int, arrays: Mapping[str, Tensor]) -> PagedState:
        """A state made from the result of `save`.

        Raises:
            ValueError: the arrays are not those of a state of `length` tokens.
            OutOfPages: no slot is free.
        """

        def write(state: PagedState, pages: Sequence[int]) -> None:
            given: dict[str, Array] = {}
            network = self._slots.network
            for kept in network.kept:
                heads, _, columns = kept.shape
                shape = (heads, rows_of(network, kept, length), columns)
                given[kept.input] = saved_array(arrays, kept.input, stored(kept), shape)
            if length:
                self._warming.join()
                self._slots.write(pages[0], length, given)

        return self._restored(length, write)
