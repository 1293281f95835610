"""Models of the Hugging Face hub: what is fetched, what is kept, and what is said when it fails.

A made-up hub on loopback takes the place of the real one.

Draws: the weights are random bytes; what is checked does not depend on their values.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_up_hub
import pytest
from made_up_hub import Hub, Repository

from transom.contract import Cancelled
from transom.errors import MissingExtra, SourceError
from transom.sources import hub, hub_names, located, resolve
from transom.sources.base import folder_name

LLAMA = b'{"model_type": "llama"}'


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The made-up hub, and the package set up for it with an empty cache."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with made_up_hub.running() as running:
        for name, value in {
            "ENDPOINT": running.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "DOWNLOAD_CHUNK_SIZE": 1 << 16,
        }.items():
            monkeypatch.setattr(constants, name, value)
        for module in (file_download, _http):  # the package waits before it tries again
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.chdir(tmp_path)
        yield running


@pytest.fixture
def weights(rng: Any) -> bytes:
    return bytes(rng.bytes(hub.RESUMED_FROM + (1 << 19)))


def pull(name: str, **options: Any) -> hub.Pulled:
    return hub.pull(hub_names.parse(name), **options)


def refusal(name: str) -> str:
    with pytest.raises(SourceError) as caught:
        pull(name)
    assert caught.value.fix
    return str(caught.value)


def checkpoint(weights: bytes) -> dict[str, bytes]:
    return {
        "config.json": LLAMA,
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE": b"free",
        "README.md": b"# m",
        "model.safetensors": weights,
        "pytorch_model.bin": weights[:9000],
        "original/consolidated.00.pth": weights[:9000],
        "onnx/model.onnx": weights[:9000],
    }


# names ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "repository", "part", "revision"),
    [
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", "", "main"),
        ("o/m:Q4_K_M", "o/m", "Q4_K_M", "main"),
        ("o/m@refs/pr/1", "o/m", "", "refs/pr/1"),
        ("o/m:onnx/model_q4.onnx@v1.0", "o/m", "onnx/model_q4.onnx", "v1.0"),
    ],
)
def test_a_name_has_a_repository_a_part_and_a_revision(text: str, repository: str, part: str, revision: str) -> None:
    assert hub_names.parse(text) == hub_names.HubName(repository, part, revision)
    assert str(hub_names.parse(text)) == text
    assert hub_names.may_be_named(text)


@pytest.mark.parametrize(
    "text", ["gpt2", "a/b/c", "./m", "~/m", "/o/m", "o/", "o/m:", "o/m@", "a b/c", "o/..", "o/m\0"]
)
def test_other_texts_are_no_names(text: str) -> None:
    assert not hub_names.may_be_named(text)
    with pytest.raises(SourceError, match="is not the name of a model of the Hugging Face hub"):
        hub_names.parse(text)


def test_the_address_of_a_page_of_the_hub_is_answered_with_its_name() -> None:
    for address, name in (
        ("https://huggingface.co/o/m", "o/m"),
        ("https://huggingface.co/o/m/tree/main", "o/m"),
        ("https://huggingface.co/o/m/tree/v2?show=all", "o/m@v2"),
        ("https://huggingface.co/o/m/resolve/main/a/m-Q8_0.gguf?download=true", "o/m:a/m-Q8_0.gguf"),
        ("https://huggingface.co/o/m/blob/main/README.md", "o/m"),
        ("hf.co/o/m:Q4_K_M", "o/m:Q4_K_M"),
    ):
        assert hub_names.of_address(address) == name
        with pytest.raises(SourceError) as caught:
            hub_names.parse(address)
        assert caught.value.fix == f"Write it like {name}"
    with pytest.raises(SourceError, match=r"Give the model's name on the hub: o/m"):
        resolve("https://huggingface.co/o/m/blob/main/config.json")


@pytest.mark.parametrize("name", ["models/tiny.gguf", "models/tiny.onnx", "models/model.safetensors"])
def test_a_missing_file_of_a_folder_is_no_name(name: str) -> None:
    assert located(name) == name


# the files of a model ------------------------------------------------------------------------------------------------
def needed(text: str, *files: str) -> hub_names.Needed:
    return hub_names.needed(hub_names.parse(text), dict.fromkeys(files, 1000))


def which(text: str, *files: str) -> str:
    with pytest.raises(SourceError) as caught:
        needed(text, *files)
    assert caught.value.fix
    return str(caught.value)


GGUFS = (
    "config.json",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-IQ4_XS.gguf",
    "m-BF16/m-BF16-00001-of-00002.gguf",
    "m-BF16/m-BF16-00002-of-00002.gguf",
    "mmproj-m-F16.gguf",
)


def test_of_several_forms_of_the_weights_only_safetensors_are_needed() -> None:
    found = needed("o/m", *checkpoint(b""))
    assert found.weights == ("model.safetensors",)
    assert set(found.sides) == {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"}


def test_the_index_says_which_safetensors_are_needed() -> None:
    files = ("config.json", hub_names.INDEX, "model-00001-of-00002.safetensors", "consolidated.safetensors")
    found = needed("o/m", *files, "pytorch_model.bin.index.json")
    assert (found.kind, found.weights) == ("safetensors", ())
    assert "pytorch_model.bin.index.json" not in found.sides


@pytest.mark.parametrize(
    ("part", "weights"),
    [
        ("Q4_K_M", ("m-Q4_K_M.gguf",)),
        ("q4_k_m", ("m-Q4_K_M.gguf",)),
        ("m-Q4_K_S.gguf", ("m-Q4_K_S.gguf",)),
        ("m-Q4_K_S", ("m-Q4_K_S.gguf",)),
        ("IQ4_XS", ("m-IQ4_XS.gguf",)),
        ("BF16", ("m-BF16/m-BF16-00001-of-00002.gguf", "m-BF16/m-BF16-00002-of-00002.gguf")),
    ],
)
def test_a_gguf_file_is_chosen_by_quantization_or_name(part: str, weights: tuple[str, ...]) -> None:
    found = needed(f"o/m:{part}", *GGUFS)
    assert (found.kind, found.weights, found.model) == ("gguf", weights, weights[0])


def test_without_a_choice_the_models_are_listed_with_their_sizes() -> None:
    text = which("o/m", *GGUFS)
    assert text.startswith("o/m holds 4 models in GGUF files. Choose one of these, as in o/m:Q4_K_M.\n")
    assert "\n  BF16       2 kB  m-BF16/m-BF16-00001-of-00002.gguf" in text
    assert "mmproj" not in text


@pytest.mark.parametrize("part", ["Q4_K", "Q4", "Q8_0", "m-Q8_0.gguf", "mmproj-m-F16.gguf", "K_M"])
def test_an_unknown_choice_lists_the_models(part: str) -> None:
    text = which(f"o/m:{part}", *GGUFS)
    assert text.startswith(f'o/m has no model "{part}". Choose one of these.\n  IQ4_XS     1 kB  m-IQ4_XS.gguf\n')


def test_two_files_of_one_quantization_are_told_apart_by_name() -> None:
    text = which("o/m:Q4_0", "a-Q4_0.gguf", "b-Q4_0.gguf")
    assert "holds 2 models that match 'Q4_0'. Choose one of these, as in o/m:a-Q4_0.gguf" in text
    assert needed("o/m:b-Q4_0", "a-Q4_0.gguf", "b-Q4_0.gguf").model == "b-Q4_0.gguf"


def test_a_split_file_that_lacks_a_part_is_refused() -> None:
    assert "lacks 2 of the 3 parts" in which("o/m", "m-00001-of-00003.gguf")


def test_an_onnx_file_comes_with_its_data_and_the_files_beside() -> None:
    files = (
        *("config.json", "tokenizer.json", "onnx/model.onnx", "onnx/model.onnx_data"),
        *("onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "cpu/genai_config.json", "cpu/x.onnx"),
    )
    found = needed("o/m", *files)
    assert (found.kind, found.weights) == ("onnx", ("onnx/model.onnx_data", "onnx/model.onnx"))
    assert found.sides == ("config.json", "tokenizer.json")
    assert needed("o/m:model_q4.onnx", *files).weights == ("onnx/model_q4.onnx_data", "onnx/model_q4.onnx")
    assert "cpu/genai_config.json" in needed("o/m:x.onnx", *files).sides


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("config.json", "pytorch_model.bin"), "only as pickled PyTorch files (pytorch_model.bin)"),
        (("adapter_config.json", "adapter_model.safetensors"), "is an adapter (LoRA), not a whole model"),
        (("README.md", ".gitattributes"), "holds no model that Transom can run, only README.md"),
        ((), "holds no model that Transom can run, only nothing"),
    ],
)
def test_a_repository_without_a_model_is_refused(files: tuple[str, ...], words: str) -> None:
    assert words in which("o/m", *files)


# downloading ---------------------------------------------------------------------------------------------------------
def test_only_what_is_needed_is_fetched_and_then_found_without_network(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    said: list[str] = []
    pulled = pull("o/m", announce=said.append)
    assert {p.name for p in pulled.path.iterdir()} == {
        *("config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "model.safetensors")
    }
    assert (pulled.path / "model.safetensors").read_bytes() == weights
    assert pulled.downloaded == sum(pulled.files.values())
    (line,) = said
    assert line.startswith(f"Downloading o/m (1.57 MB) from {server.endpoint} to ")
    assert pull("o/m", announce=said.append).downloaded == 0
    assert len(said) == 1
    server.asked.clear()
    assert located("o/m") == pulled.path
    assert located(f"o/m@{pulled.commit}") == pulled.path
    assert server.asked == []


def test_a_folder_of_the_cache_has_the_name_of_its_model(server: Hub, weights: bytes, tmp_path: Path) -> None:
    server.repositories["some-one/Tiny-Model.5"] = Repository(checkpoint(weights))
    assert folder_name(pull("some-one/Tiny-Model.5").path) == "Tiny-Model.5"
    assert folder_name(tmp_path) == tmp_path.name


def test_a_model_of_the_cache_is_found_without_the_slow_parts_of_the_package(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    path = pull("o/m").path
    program = """
import sys
from transom.sources import located
assert not any(name.startswith("huggingface_hub") for name in sys.modules)
assert located(sys.argv[0]) == sys.argv[0]
print(located("o/m"))
print(sorted(name for name in sys.modules if name.startswith(("huggingface_hub.", "httpx", "tqdm"))))
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(path.parents[2]), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    found, modules = done.stdout.splitlines()
    assert found == str(path)
    assert modules == "['huggingface_hub.constants']"


def test_a_sharded_model_needs_the_shards_of_its_index(server: Hub, weights: bytes) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": weights[i:] for i in (1, 2)}
    index = {"weight_map": dict.fromkeys(shards, "") | {n: n for n in shards}}
    files = {**checkpoint(b""), **shards, hub_names.INDEX: json.dumps(index).encode()}
    del files["model.safetensors"]
    server.repositories["o/m"] = Repository(files | {"consolidated.safetensors": weights})
    path = pull("o/m").path
    assert sorted(p.name for p in path.glob("*.safetensors")) == sorted(shards)
    assert located("o/m", offline=True) == path
    (path / min(shards)).unlink()
    with pytest.raises(SourceError, match="neither a path here nor whole in the cache"):
        located("o/m", offline=True)
    server.repositories["o/n"] = Repository({n: d for n, d in files.items() if n != max(shards)})
    assert "o/n lacks 1 of 2 weight files: model-00002-of-00002.safetensors" in refusal("o/n")


def test_a_gguf_file_is_fetched_alone(server: Hub, weights: bytes) -> None:
    server.repositories["o/g"] = Repository({f"g-{q}.gguf": weights[i:] for i, q in enumerate(("Q8_0", "Q4_K_M"))})
    path = located("o/g:q4_k_m")
    assert path.name == "g-Q4_K_M.gguf"
    assert path.read_bytes() == weights[1:]
    server.asked.clear()
    assert located("o/g") == path  # the only one that is here
    assert located("o/g:g-Q4_K_M.gguf") == path
    assert server.asked == []
    located("o/g:Q8_0")
    assert server.asked


def stop_in_the_middle(stage: str, share: float | None) -> None:
    if share is not None and share > 0.5:
        raise Cancelled


def test_a_download_that_was_stopped_continues(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    with pytest.raises(Cancelled):
        pull("o/m", progress=stop_in_the_middle)
    (part,) = (Path("hub") / "models--o--m" / "blobs").glob("*.incomplete")
    begun = part.stat().st_size
    assert 0 < begun < len(weights)
    assert hub.cached(hub_names.parse("o/m")) is None
    server.asked.clear()
    shares: list[float] = []
    said: list[str] = []
    pulled = pull("o/m", progress=lambda stage, share: shares.append(share or 0.0), announce=said.append)
    assert [a.range for a in server.asked if a.storage and a.method == "GET"] == [f"bytes={begun}-"]
    assert (pulled.path / "model.safetensors").read_bytes() == weights
    assert pulled.downloaded == len(weights) - begun
    assert next(s for s in shares if s) > 0.4  # what was here counts as done
    assert " of 1.57 MB) from " in said[0]
    assert not part.exists()


def test_a_connection_that_breaks_is_made_again(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    server.cut_after += [300_000, 400_000]
    assert (pull("o/m").path / "model.safetensors").read_bytes() == weights
    assert len([a for a in server.asked if a.storage and a.range]) == 2


def test_a_connection_that_breaks_again_and_again_is_an_error_and_keeps_what_came(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    server.cut_after += [300_000] + [0] * 20
    assert "the connection broke" in refusal("o/m")
    (part,) = (Path("hub") / "models--o--m" / "blobs").glob("*.incomplete")
    assert part.read_bytes() == weights[: part.stat().st_size] != b""


def test_two_downloads_of_one_model_at_once_fetch_it_once(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    with ThreadPoolExecutor(3) as pool:
        paths = {pulled.path for pulled in pool.map(pull, ["o/m"] * 3)}
    (path,) = paths
    assert (path / "model.safetensors").read_bytes() == weights
    assert len([a for a in server.asked if a.storage and a.method == "GET"]) == 1


def test_a_damaged_file_is_not_kept(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    server.damage = True
    assert "model.safetensors of o/m arrived damaged" in refusal("o/m")
    assert not list((Path("hub") / "models--o--m" / "blobs").glob("*.incomplete"))
    server.damage = False
    assert (pull("o/m").path / "model.safetensors").read_bytes() == weights


def test_a_beginning_of_other_bytes_is_found_by_the_hash(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    with pytest.raises(Cancelled):
        pull("o/m", progress=stop_in_the_middle)
    (part,) = (Path("hub") / "models--o--m" / "blobs").glob("*.incomplete")
    part.write_bytes(bytes(part.stat().st_size or 100))
    assert "arrived damaged" in refusal("o/m")
    assert (pull("o/m").path / "model.safetensors").read_bytes() == weights


def test_the_token_goes_to_the_hub_and_not_to_its_storage(
    server: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights), token="secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    pull("o/m")
    assert {a.token for a in server.asked if not a.storage and "/o/m" in a.path} == {"secret"}
    assert {a.token for a in server.asked if a.storage} == {""}


def test_a_revision_is_kept_beside_the_main_one(server: Hub, weights: bytes) -> None:
    repository = server.repositories["o/m"] = Repository(checkpoint(weights))
    repository.commit({**checkpoint(weights), "config.json": LLAMA + b" "}, "dev/new")
    first, second = pull("o/m"), pull("o/m@dev/new")
    assert first.path != second.path
    assert second.downloaded == len(LLAMA) + 1  # the rest is the same
    assert located("o/m") == first.path
    assert located("o/m@dev/new") == second.path


def test_loading_keeps_to_the_cache_and_pull_gets_what_is_new(server: Hub, weights: bytes) -> None:
    repository = server.repositories["o/m"] = Repository(checkpoint(weights))
    old = located("o/m")
    repository.commit({**checkpoint(weights), "tokenizer.json": b'{"new": 1}'})
    assert located("o/m") == old
    new = pull("o/m").path
    assert located("o/m") == new != old


def test_a_folder_without_tokenizer_from_another_program_is_completed(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    path = pull("o/m").path
    (path / "tokenizer.json").unlink()
    assert located("o/m", offline=True) == path
    assert not (path / "tokenizer.json").exists()
    assert located("o/m") == path
    assert (path / "tokenizer.json").exists()


def test_an_unknown_architecture_is_refused_before_its_weights_are_fetched(
    server: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transom.sources.mobius.installed", lambda: False)
    server.repositories["o/m"] = Repository({**checkpoint(weights), "config.json": b'{"model_type": "never-heard-of"}'})
    assert "never-heard-of" in refusal("o/m")
    assert not [a for a in server.asked if a.storage]


def test_a_download_is_logged(server: Hub, weights: bytes, caplog: pytest.LogCaptureFixture) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    with caplog.at_level(logging.WARNING, logger="transom"):
        located("o/m")
    assert [r.getMessage().partition(" (")[0] for r in caplog.records if r.name == "transom.hub"] == ["Downloading o/m"]


# refusals ------------------------------------------------------------------------------------------------------------
def test_a_model_that_does_not_exist(server: Hub) -> None:
    text = refusal("o/none")
    assert f"There is no model o/none on {server.endpoint}, or it is private" in text
    assert "hf auth login, or set HF_TOKEN" in text


def test_a_private_model_without_and_with_the_wrong_token(
    server: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights), token="secret")
    assert "or it is private" in refusal("o/m")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "or it is private" in refusal("o/m")


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_gated_model(server: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights), token="secret", gated=True)
    monkeypatch.setenv("HF_TOKEN", token)
    text = refusal("o/m")
    assert "o/m is gated: its owner decides who may download it" in text
    assert f"Ask for access on {server.endpoint}/o/m" in text


def test_an_unknown_revision(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    assert 'o/m has no revision "v9"' in refusal("o/m@v9")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "refuses access to o/m"),
        (429, "has had too many requests"),
        (500, "answers with the HTTP status 500"),
    ],
)
def test_other_answers(server: Hub, status: int, words: str) -> None:
    server.status = status
    assert words in refusal("o/m")


def test_a_login_page_in_the_place_of_the_hub(server: Hub) -> None:
    server.page = "<html>Welcome to our hotel</html>"
    assert "does not answer as the Hugging Face hub does" in refusal("o/m")


def test_no_network(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    text = refusal("o/m")
    assert "http://127.0.0.1:9 cannot be reached" in text
    assert "Check the network" in text


def test_downloads_can_be_forbidden(server: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    server.repositories["o/m"] = Repository(checkpoint(weights))
    with pytest.raises(SourceError) as caught:
        located("o/m", offline=True)
    assert "offline=True forbids downloading. Download it once: transom pull o/m" in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE forbids downloading"):
        located("o/m")
    assert "HF_HUB_OFFLINE forbids downloading" in refusal("o/m")
    assert server.asked == []


def test_a_folder_here_comes_first(server: Hub, weights: bytes) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    Path("o/m").mkdir(parents=True)
    assert located("o/m") == "o/m"
    shutil.rmtree("o/m")
    with pytest.raises(SourceError) as caught:  # rather a mistyped path than a name
        located("o/m")
    assert "The folder o here has no m" in str(caught.value)
    assert "transom pull o/m" in caught.value.fix
    path = pull("o/m").path
    assert located("o/m") == path


def test_paths_and_objects_are_no_names(server: Hub) -> None:
    for spec in (Path("o/m"), None, 3, "", object()):
        assert located(spec) is spec
    assert server.asked == []


def test_without_the_package_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"There is no o/m here.*pip install 'transom\[hub\]'"):
        located("o/m")
    with pytest.raises(MissingExtra, match=r"pip install 'transom\[hub\]'"):
        pull("o/m")
    assert hub.cached_names() == []


def test_a_disk_without_room_is_told_before_the_download(
    server: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories["o/m"] = Repository(checkpoint(weights))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert "has no room for o/m: 1.57 MB are to be downloaded, and 1 MB are free" in refusal("o/m")
    assert not [a for a in server.asked if a.storage]


@pytest.mark.parametrize(("number", "words"), [(28, "has no room for o/m: it is full"), (13, "cannot be written")])
def test_a_cache_that_cannot_be_written(
    server: Hub, weights: bytes, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    from huggingface_hub import file_download

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number), "a blob")

    server.repositories["o/m"] = Repository(checkpoint(weights))
    monkeypatch.setattr(file_download, "http_get", refuse)
    text = refusal("o/m")
    assert words in text
    assert "HF_HOME" in text


def test_the_cache_lists_its_models(server: Hub, weights: bytes) -> None:
    assert hub.cached_names() == []
    server.repositories["o/m-1"] = Repository(checkpoint(weights))
    pull("o/m-1")
    assert hub.cached_names() == ["o/m-1"]
