"""Options that several commands share, and their conversion to arguments of `transom.load` and of a generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from transom.cli.output import ProgressLine, reserve_stdout

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])

PRECISIONS = ("auto", "exact", "fast", "f32", "bf16", "f16", "int8", "fp8", "int4")
VERIFIES = ("auto", "off", "always")
"""The values of `transom.api.load`, repeated here because `--help` must not import it."""


class _Utf8(click.ParamType[str]):
    """Text for the model. An argument that is not UTF-8 contains surrogates, which no tokenizer takes."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            import os

            from transom.errors import OptionError

            try:
                os.fsencode(value).decode()
            except UnicodeDecodeError as e:
                raise OptionError(
                    f"{_shown_name(param)} is not UTF-8 text: byte 0x{e.object[e.start]:02x} at position {e.start}",
                    'Convert it first, as in: transom run MODEL "$(iconv -f latin1 -t utf-8 FILE)"',
                ) from None
        return value


def _shown_name(parameter: click.Parameter | None) -> str:
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return f"The argument {parameter.human_readable_name}" if parameter is not None else "The argument"


UTF8 = _Utf8()


def _starting_with(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def complete_device(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from transom import hardware

    return _starting_with(incomplete, ["auto", *(d.id for d in (*hardware.probe().devices, *hardware.catalogue()))])


def complete_backend(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from transom.plugins import load_plugins

    return _starting_with(incomplete, ["auto", *load_plugins().backends])


def complete_sparsity(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from transom.sparsity import PRESETS

    return _starting_with(incomplete, PRESETS)


class ModelPath(click.Path):
    """A path, or the id of a model of the Hugging Face hub; those in its cache are completed."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name) for name in complete_hub(ctx, param, incomplete)] if incomplete else []
        return [*found, *super().shell_complete(ctx, param, incomplete)]


def complete_hub(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from transom.sources.hub import cached_names

    return _starting_with(incomplete, cached_names())


MODEL = click.argument("model", type=ModelPath())
OFFLINE = click.option(
    "--offline", is_flag=True, help="Never download: take a model of the Hugging Face hub from its cache."
)
DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    shell_complete=complete_device,
    help="An id from `transom devices`, or several separated by commas. A named device never falls back to another.",
)
BACKEND = click.option(
    "--backend",
    default="auto",
    show_default=True,
    shell_complete=complete_backend,
    help="A name from `transom backends`. A named backend never falls back to another.",
)
CONTEXT = click.option(
    "--context", type=int, help="Maximum tokens of prompt and answer together. [default: the model's own]"
)


def _precision(default: str) -> Callable[[F], F]:
    return click.option(
        "--precision", type=click.Choice(PRECISIONS), default=default, show_default=True, help="Compute precision."
    )


PRECISION = _precision("auto")
THREADS = click.option(
    "--threads", type=int, help="CPU threads, at most one for each core. [default: all cores available to this process]"
)
SPARSITY = click.option(
    "--sparsity",
    metavar="NAME|FILE|SHARE",
    default="off",
    show_default=True,
    shell_complete=complete_sparsity,
    help="Which keys attention reads: off (all), safe, balanced, fast, classic; a coverage such as 0.94; a JSON file.",
)
VERIFY = click.option(
    "--verify",
    type=click.Choice(VERIFIES),
    default="auto",
    show_default=True,
    help="Compare the compiled model with the reference. auto: once on each device.",
)
DETERMINISTIC = click.option(
    "--deterministic",
    is_flag=True,
    help="The same request gives the same tokens whatever else runs: only backends that promise it.",
)
MAX_KL = click.option(
    "--max-kl",
    type=float,
    metavar="NATS",
    help="Largest mean divergence from the reference that is accepted. [default: the backend's own limit]",
)
PROBE_FILE = click.option(
    "--probe-file",
    type=click.Path(dir_okay=False),
    help="Read the devices from this file, as `transom doctor --json` writes it.",
)


def _be_quiet(context: click.Context, parameter: click.Parameter, quiet: bool) -> bool:
    from transom.cli.output import be_quiet

    be_quiet(quiet)
    return quiet


QUIET = click.option("-q", "--quiet", is_flag=True, callback=_be_quiet, help="Nothing on stderr but errors.")


def _json(context: click.Context, parameter: click.Parameter, wanted: bool) -> bool:
    if wanted and not context.resilient_parsing:
        reserve_stdout()
    return wanted


JSON = click.option("--json", "as_json", is_flag=True, callback=_json, help="Print JSON.")

_LOADING = (
    *(DEVICE, BACKEND, CONTEXT, PRECISION, THREADS, SPARSITY, VERIFY, DETERMINISTIC, MAX_KL, PROBE_FILE, OFFLINE, JSON),
)
_LOAD_NAMES = (
    *("device", "backend", "context", "precision", "threads", "sparsity", "verify", "deterministic", "max_kl"),
    *("probe_file", "offline"),
)

_SAMPLING = (
    click.option(
        "--max-tokens", "max_new_tokens", type=int, help="Maximum number of tokens to generate. [default: what fits]"
    ),
    click.option("--temperature", type=float, help="Sampling temperature; 0: greedy. [default: the model's own, or 0]"),
    click.option("--top-k", type=int, help="Sample from the k most likely tokens; 0: off."),
    click.option(
        "--top-p", type=float, help="Sample from the most likely tokens that sum to this probability; 1: off."
    ),
    click.option("--min-p", type=float, help="Drop tokens below this fraction of the highest probability; 0: off."),
    click.option(
        "--repetition-penalty", type=float, help="Above 1: makes tokens of the prompt and answer less likely."
    ),
    click.option("--presence-penalty", type=float, help="Subtracted from the logit of each token in the answer."),
    click.option(
        "--frequency-penalty", type=float, help="Subtracted from a token's logit for each occurrence in the answer."
    ),
    click.option("--seed", type=int, help="Random seed. Same seed, model and device: same answer."),
    click.option(
        "--stop", type=UTF8, multiple=True, metavar="TEXT", help="End the answer before this text; can be repeated."
    ),
    click.option(
        "--stop-token-id", "stop_token_ids", type=int, multiple=True, help="End after this token; can be repeated."
    ),
    click.option("--logit-bias", multiple=True, metavar="ID=NUMBER", help="Add to a token's logit; -inf bans it."),
    click.option("--ignore-eos", is_flag=True, help="Continue after the model's end-of-text token."),
    click.option(
        "--json-schema", type=UTF8, metavar="FILE|JSON", help="The answer is JSON that conforms to this schema."
    ),
    click.option("--regex", type=UTF8, help="The answer matches this regular expression as a whole."),
    click.option(
        "--choice", type=UTF8, multiple=True, metavar="TEXT", help="The answer is one of these; can be repeated."
    ),
    click.option("--grammar", type=UTF8, metavar="FILE|TEXT", help="The answer follows this Lark or GBNF grammar."),
)
_SAMPLING_NAMES = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "stop", "stop_token_ids", "logit_bias", "ignore_eos", "json_schema", "regex"),
    *("choice", "grammar"),
)


def loading(command: F) -> F:
    """Add the options of `transom.load`, `--probe-file` and `--json` among them."""
    for option in reversed(_LOADING):
        command = option(command)
    return command


def loading_exactly(command: F) -> F:
    """As `loading`, for a command whose default precision is `exact`."""
    for option in reversed([_precision("exact") if o is PRECISION else o for o in _LOADING]):
        command = option(command)
    return command


def located_model(model: str, offline: bool, progress: ProgressLine) -> Any:
    """What a command's argument names: a path, or a model of the hub, which is downloaded if need be.

    Raises:
        MissingExtra, SourceError: as `transom.sources.located`.
    """
    from transom.sources import located

    return located(model, offline=offline, progress=progress, announce=progress.say)


def load_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of `transom.load` out of a command's options."""
    return {name: options.pop(name) for name in _LOAD_NAMES}


def sampling(command: F) -> F:
    """Add the options that become fields of `SamplingParams`."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def sampling_arguments(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Take the options of a generation that were given out of a command's options, parsed and checked.

    `more`: further fields of `SamplingParams`.

    Raises:
        OptionError: a value is invalid for every model; this is checked before a model is loaded.
    """
    from transom.generation.params import resolve

    given = {name: options.pop(name) for name in _SAMPLING_NAMES} | more
    if given["logit_bias"]:
        given["logit_bias"] = dict(_bias(text) for text in given["logit_bias"])
    if given["json_schema"] is not None:
        given["json_schema"] = _schema(given["json_schema"])
    if given["grammar"] is not None:
        given["grammar"] = _grammar(given["grammar"])
    given = {name: value for name, value in given.items() if value is not None and value != () and value is not False}
    resolve(given)
    return given


def _bias(text: str) -> tuple[int, float]:
    from transom.errors import OptionError

    token, _, amount = text.partition("=")
    try:
        return int(token), float(amount)
    except ValueError:
        raise OptionError(
            f"--logit-bias {text} is not a token id and a number", "Write it like --logit-bias 42=-inf"
        ) from None


def _schema(value: str) -> Any:
    """JSON from the argument itself, or from the file that it names."""
    import json

    from transom.errors import OptionError

    inline = value.lstrip().startswith(("{", "[")) or value.strip() in ("true", "false")
    text = value if inline else _read(value, "--json-schema")
    where = "--json-schema" if inline else value
    try:
        return json.loads(text)
    except ValueError as e:
        raise OptionError(f"{where} is not JSON: {e}", "Give a JSON schema, or a file that contains one") from None


def _grammar(value: str) -> str:
    from pathlib import Path

    is_text = "\n" in value or "::=" in value or ":" in value.replace(":\\", "")
    return value if is_text and not Path(value).is_file() else _read(value, "--grammar")


def _read(path: str, option: str) -> str:
    from pathlib import Path

    from transom.errors import OptionError

    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise OptionError(f"{option} {path} is not UTF-8 text", "Save it as UTF-8") from None
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise OptionError(
            f"{option} {path} cannot be read: {reason}", "Give the path of a file, or the text itself"
        ) from None
