"""`transom pull`, and the names of the Hugging Face hub in place of paths; a made-up hub is on loopback.

Draws: the model's weights, which the backend ignores.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up_hub
import pytest
import toy
from made_up_hub import Hub, Repository

NAME = "some-one/Toy-GGUF"
TOY = ("--backend", "toy", "--verify", "off")


@pytest.fixture
def server(model: Path) -> Iterator[Hub]:
    with made_up_hub.running() as running:
        data = model.read_bytes()
        running.repositories[NAME] = Repository({"toy-Q8_0.gguf": data, "toy-Q4_K_M.gguf": data[:5000]})
        yield running


@pytest.fixture
def at_hub(server: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a command that uses the made-up hub, with a cache of its own."""
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"), "HF_HUB_OFFLINE": "0"}
    return {**home, "HF_ENDPOINT": server.endpoint, "HF_TOKEN": "", "NO_PROXY": "127.0.0.1,localhost"}


def test_run_downloads_a_model_once_and_says_so(transom: Any, server: Hub, at_hub: dict[str, str], model: Path) -> None:
    first = transom("run", f"{NAME}:Q8_0", "Hi", *TOY, env=at_hub)
    assert (first.status, first.out) == (0, toy.TEXT + "\n"), first
    assert first.err.startswith(f"Downloading {NAME}:Q8_0 (")
    assert f"from {server.endpoint} to {at_hub['HF_HUB_CACHE']}" in first.err.splitlines()[0]
    server.asked.clear()
    away = {**at_hub, "HF_ENDPOINT": "http://127.0.0.1:9"}
    again = transom("run", NAME, "Hi", *TOY, "--quiet", env=away)
    assert (again.status, again.out, again.err) == (0, toy.TEXT + "\n", "")
    assert server.asked == []


def test_pull_prints_json_and_says_when_nothing_is_to_be_done(
    transom: Any, server: Hub, at_hub: dict[str, str], model: Path
) -> None:
    server.cut_after.append(1000)  # huggingface_hub would warn about it
    done = transom("pull", f"{NAME}:q8_0", "--json", "--quiet", env=at_hub)
    assert done.err == ""
    first = json.loads(done.out)
    size = model.stat().st_size
    assert first["name"] == f"{NAME}:q8_0"
    assert first["files"] == {"toy-Q8_0.gguf": size}
    assert first["downloaded"] == size
    assert first["path"].endswith(f"snapshots/{first['commit']}/toy-Q8_0.gguf")
    again = transom("pull", f"{NAME}:Q8_0", env=at_hub)
    assert (again.out.strip(), again.err) == (first["path"], "Nothing to download: it is up to date.\n")


def test_a_download_that_was_interrupted_continues(transom: Any, server: Hub, at_hub: dict[str, str]) -> None:
    data = bytes(12 << 20)  # huggingface_hub writes blocks of 10 MiB
    server.repositories["o/large"] = Repository({"large.gguf": data})
    server.stop_after = 11 << 20
    first = transom.begin("pull", "o/large", env={**at_hub, "HF_HUB_DOWNLOAD_TIMEOUT": "600"})
    while not server.stopped.wait(0.01):
        assert first.poll() is None, first.communicate()
    part = Path(at_hub["HF_HUB_CACHE"]) / "models--o--large" / "blobs"
    while not any(p.stat().st_size for p in part.glob("*.incomplete")):
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    server.stop_after = None
    begun = next(part.glob("*.incomplete")).stat().st_size
    server.asked.clear()
    done = transom("pull", "o/large", env=at_hub)
    assert Path(done.out.strip()).read_bytes() == data
    assert [a.range for a in server.asked if a.storage and a.method == "GET"] == [f"bytes={begun}-"]


@pytest.mark.parametrize("verb", ["pull", "run", "export"])
def test_a_shell_completes_the_models_of_the_cache(bare: Any, at_hub: dict[str, str], verb: str) -> None:
    (Path(at_hub["HF_HUB_CACHE"]) / "models--o--large-1").mkdir(parents=True)
    words = {"_TRANSOM_COMPLETE": "bash_complete", "COMP_WORDS": f"transom {verb} o/", "COMP_CWORD": "2"}
    assert "plain,o/large-1" in bare(env={**at_hub, **words}).out.splitlines()


@pytest.mark.parametrize("verb", ["pull", "run"])
def test_an_error_is_two_sentences_and_status_2(transom: Any, server: Hub, at_hub: dict[str, str], verb: str) -> None:
    prompt = ("Hello",) if verb == "run" else ()
    done = transom(verb, "o/none", *prompt, "--json", env=at_hub)
    assert done.status == 2
    assert f"Error: There is no model o/none on {server.endpoint}, or it is private. Check the name" in done.err
    assert json.loads(done.out)["error"]["type"] == "SourceError"
    assert "Traceback" not in done.err


def test_the_models_of_a_repository_are_listed(transom: Any, server: Hub, at_hub: dict[str, str]) -> None:
    done = transom("chat", NAME, env=at_hub)
    assert done.status == 2
    assert f"{NAME} holds 2 models in GGUF files. Choose one of these, as in {NAME}:Q4_K_M." in done.err
    assert "\n  Q4_K_M     5 kB  toy-Q4_K_M.gguf" in done.err


@pytest.mark.parametrize(
    "arguments",
    [("explain", NAME), ("bench", NAME), ("export", NAME, "--target", "cpu", "--out", "x"), ("inspect", NAME)],
)
def test_every_command_takes_a_name_and_downloads_nothing_offline(
    transom: Any, server: Hub, at_hub: dict[str, str], arguments: tuple[str, ...]
) -> None:
    done = transom(*arguments, "--offline", env=at_hub)
    assert done.status == 2
    assert "--offline forbids downloading. Download it once: transom pull" in done.err
    assert server.asked == []


def test_run_of_an_address(bare: Any) -> None:
    done = bare("run", "https://huggingface.co/o/m", "Hello")
    assert done.status == 2
    assert "https://huggingface.co/o/m is an address, not a path. Give the model's name on the hub: o/m." in done.err


def test_pull_of_what_is_no_name(bare: Any) -> None:
    done = bare("pull", "https://huggingface.co/o/m")
    assert done.status == 2
    assert "is not the name of a model of the Hugging Face hub. Write it like o/m." in done.err
