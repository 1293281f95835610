"""The asynchronous methods give what the others give, do not block the loop, and end with their task.

Draws: nothing; the fake model computes its logits from its tokens.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import pytest
from fakes import loaded, text_session

from transom.errors import OptionError
from transom.generation.model import Model

OPTIONS: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3, "ignore_eos": True}
ENDLESS: dict[str, Any] = {"max_new_tokens": 9000, "ignore_eos": True}


@pytest.fixture
def model() -> Model:
    return Model(loaded(text_session(context=10_000)))


def test_each_method_gives_what_the_other_gives(model: Model) -> None:
    async def all_of_them() -> list[Any]:
        pieces = [piece async for piece in model.astream("Hello", **OPTIONS)]
        said = [piece async for piece in model.astream_chat("Hello", **OPTIONS)]
        return [pieces, said, await model.agenerate("Hello", **OPTIONS), await model.achat("Hello", **OPTIONS)]

    pieces, said, generated, answered = asyncio.run(all_of_them())
    assert pieces == list(model.stream("Hello", **OPTIONS))
    assert said == list(model.stream_chat("Hello", **OPTIONS))
    assert generated.choices == model.generate("Hello", **OPTIONS).choices
    assert answered.choices == model.chat("Hello", **OPTIONS).choices


def test_many_run_at_once_and_the_loop_goes_on(model: Model) -> None:
    async def together() -> list[str]:
        answers = await asyncio.gather(*(model.agenerate(f"prompt {i}", **OPTIONS) for i in range(50)))
        return [answer.text for answer in answers]

    assert asyncio.run(together()) == [model.generate(f"prompt {i}", **OPTIONS).text for i in range(50)]


def test_the_result_follows_the_pieces(model: Model) -> None:
    async def run() -> tuple[str, str]:
        async with model.astream("Hello", **OPTIONS) as stream:
            first = await anext(stream)
            result = await stream.result()
            return first + "".join([piece async for piece in stream]), result.text

    text, whole = asyncio.run(run())
    assert text == whole


def test_errors_are_raised_where_the_answer_is_awaited(model: Model) -> None:
    async def run() -> None:
        with pytest.raises(OptionError, match="top_p"):
            await model.agenerate("x", top_p=7)
        with pytest.raises(OptionError, match="no messages"):
            async for _ in model.astream_chat([]):
                pass

    asyncio.run(run())


@pytest.mark.parametrize("how", ["cancel the task", "leave the block", "cancel the stream", "drop it"])
def test_the_generation_ends_with_its_task(model: Model, how: str) -> None:
    async def run() -> None:
        if how == "cancel the task":
            begun = asyncio.Event()

            async def read() -> None:
                async for _ in model.astream("x", **ENDLESS):
                    begun.set()

            task = asyncio.ensure_future(read())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "leave the block":
            async with model.astream("x", **ENDLESS) as stream:
                await anext(stream)
        elif how == "cancel the stream":
            stream = model.astream("x", **ENDLESS)
            await anext(stream)
            stream.cancel()
            assert (await stream.result()).finish_reason == "cancelled"
        else:
            async for _ in model.astream("x", **ENDLESS):
                break
            gc.collect()

    asyncio.run(run())
    for thread in threading.enumerate():
        if thread.name == "transom-async":
            thread.join(60)
            assert not thread.is_alive()
    assert len(model.generate("x", max_new_tokens=3, ignore_eos=True).token_ids) == 3
