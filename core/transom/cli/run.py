"""`transom run`: one prompt, one answer, and one line with device, backend and speed.

On the warm start path: imports nothing that an answer does not need.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from transom.cli.options import MODEL, QUIET, UTF8, load_arguments, loading, located_model, sampling, sampling_arguments
from transom.cli.output import AnswerPrinter, ProgressLine, aside, error_facts, is_terminal, print_json, warn

if TYPE_CHECKING:
    from transom.generation.model import Model
    from transom.generation.streams import Stream

TOKENS_OF_SEVERAL = 512
"""The default of --max-tokens for several answers, which are shown only when all have ended."""
WORTH_KEEPING = 0.9
"""A prompt cache that covered this share of the prompt is not rewritten."""


@click.command(
    epilog="""\b
Examples:
  transom run model.gguf "Why is the sky blue?"
  transom run Qwen/Qwen2.5-0.5B-Instruct "Why is the sky blue?"
  transom run path/to/checkpoint "Say hello" --system "You speak French." --temperature 0.7
  git diff | transom run model.gguf --system "Write a commit message for this change."
  transom run model.gguf --raw "Once upon a time" --max-tokens 100
  transom run model.gguf "A person, as JSON" --json-schema person.json --quiet | jq .name
  transom run model.gguf "Hello" --device cuda:0 --json
  transom run model.gguf --prompt-cache report.cache < report-and-question.txt
"""
)
@MODEL
@click.argument("prompt", type=UTF8, required=False)
@click.option("--raw", is_flag=True, help="Complete the text directly, without the model's chat template.")
@click.option("--system", type=UTF8, help="A system message before the prompt.")
@click.option(
    "--template-variable",
    "variables",
    type=UTF8,
    multiple=True,
    metavar="NAME=VALUE",
    help="A variable of the chat template; can be repeated.",
)
@click.option(
    "--n", type=int, default=1,
    help="Number of answers; more than one needs a temperature above 0. [max tokens of each: 512, if not given]",
)  # fmt: skip
@click.option(
    "--logprobs", type=int, help="With --json: log-probabilities of each token and of the N most likely alternatives."
)
@click.option(
    "--prompt-cache", type=click.Path(dir_okay=False), metavar="FILE",
    help="Reuse the part of the prompt that is cached in FILE; update FILE if that was less than 90%.",
)  # fmt: skip
@QUIET
@click.option(
    "-v", "--verbose", is_flag=True, help="Also print why the device and backend were chosen, memory, and notes."
)
@sampling
@loading
def run(
    model: str,
    prompt: str | None,
    raw: bool,
    system: str | None,
    variables: tuple[str, ...],
    n: int,
    logprobs: int | None,
    prompt_cache: str | None,
    quiet: bool,
    verbose: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Answer PROMPT, or standard input (if piped, or if PROMPT is -), and exit.

    MODEL is a GGUF file, a Hugging Face directory, an ONNX file, a bundle, or the id of a model of the Hugging Face hub
    (see `transom pull --help`). The answer goes to stdout; device, backend and speed go to stderr.
    """
    import transom
    from transom.errors import OptionError
    from transom.generation.report import answer_line, cut_cause, incomplete, token_line
    from transom.loading.template_check import require_sound_template

    generation = sampling_arguments(options, n=n, logprobs=logprobs)
    if raw and (system is not None or variables):
        raise OptionError(
            "--raw uses no chat template, so --system and --template-variable cannot be used with it",
            "Leave out --raw, or write everything into the prompt",
        )
    if logprobs is not None and not as_json:
        raise OptionError("--logprobs prints nothing without --json", "Add --json, or leave it out")
    text = _prompt(prompt, keep=raw)
    if prompt_cache is not None and not os.path.isdir(os.path.dirname(prompt_cache) or "."):
        raise OptionError(
            f"There is no folder for the prompt cache {prompt_cache}", "Create it, or choose another file"
        )
    with ProgressLine(quiet=quiet, stage="load") as progress:
        deterministic = options["deterministic"]
        path = located_model(model, options["offline"], progress)
        if not raw:
            require_sound_template(path)
        loaded = transom.load(path, **load_arguments(options), progress=progress)
    with loaded:
        if not quiet:
            for warning in loaded.report.warnings:
                warn(warning)
            if not raw and loaded.chat_template is None and loaded.decoder is not None:
                warn(f"{loaded.name} has no chat template, so it continues the prompt as text; --raw says it is meant")
        if prompt_cache is not None:
            if not loaded.saves_prompts:
                under = " with --deterministic" if deterministic else ""
                raise OptionError(
                    f"The backend {loaded.report.backend} cannot write prompt caches{under}", "Leave out --prompt-cache"
                )
            if os.path.exists(prompt_cache):
                loaded.load_prompt_cache(prompt_cache)
        with ProgressLine(quiet=quiet, stage="prompt") as progress:
            generation["progress"] = progress.prompt
            stream = _start(loaded, text, raw, system, variables, generation)
            answer = AnswerPrinter(progress)
            if as_json or n > 1:
                answer.collect(stream)
            else:
                answer.print(stream)
        result = stream.result
        error = incomplete(loaded.report, result)
        if as_json:
            about = {} if error is None else {"error": error_facts(error)}
            print_json({**result.to_dict(), "report": loaded.report.to_dict(), **about})
        elif n > 1:
            for choice in result.choices:
                click.secho(f"[{choice.index + 1} of {n}]", bold=True)
                click.echo(choice.text)
        if not quiet and not as_json:
            if error is None and (cut := cut_cause(loaded.report, result)):
                aside(". ".join(cut) + ".")
            aside(answer_line(loaded.report, result))
            if verbose:
                aside(f"{token_line(result)}\n{loaded.report}")
        if prompt_cache is not None and result.usage.cached_tokens < WORTH_KEEPING * result.usage.prompt_tokens:
            saved = loaded.save_prompt_cache(prompt_cache)
            if not saved and not quiet:
                aside("The prompt is too short for a prompt cache: nothing was written.")
    if answer.stopped:
        raise KeyboardInterrupt
    if error is not None:
        raise error
    return 0


def _prompt(prompt: str | None, *, keep: bool) -> str:
    """The prompt: the argument, or standard input. `keep` preserves the last line break of standard input.

    Raises:
        OptionError: there is no prompt, or it is not UTF-8.
    """
    from transom.errors import OptionError

    piped = sys.stdin is not None and (prompt == "-" or not is_terminal(sys.stdin))
    if prompt in (None, "-") and not piped:
        raise OptionError("There is no prompt", 'Give it after the model, as in: transom run MODEL "Hello"')
    if prompt is None or prompt == "-":
        data = sys.stdin.buffer.read()
        try:
            prompt = data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise OptionError(
                f"Standard input is not UTF-8 text: byte 0x{data[e.start]:02x} at position {e.start}",
                "Convert it first, as in: iconv -f latin1 -t utf-8 FILE | transom run MODEL",
            ) from None
        if not keep:
            prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt and not keep:
        raise OptionError(
            "The prompt is empty", "Give at least one character, or generate from an empty prompt with: --raw ''"
        )
    return prompt


def _start(
    model: Model, prompt: str, raw: bool, system: str | None, variables: tuple[str, ...], options: dict[str, Any]
) -> Stream:
    from transom.errors import ContextExceeded, OptionError

    unlimited = "max_new_tokens" not in options and model.generation_defaults.max_new_tokens is None
    if options["n"] > 1 and unlimited:
        try:
            return _start(model, prompt, raw, system, variables, {**options, "max_new_tokens": TOKENS_OF_SEVERAL})
        except ContextExceeded:  # then the context is the limit
            pass
    if raw or (model.chat_template is None and model.decoder is not None):
        if system is not None or variables:
            raise OptionError(
                "The model has no chat template, so --system and --template-variable cannot be used",
                "Write everything into the prompt",
            )
        return model.stream(prompt, **options)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    return model.stream_chat(messages, template_variables=_variables(variables), **options)


def _variables(texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE as a mapping; values that are valid JSON (true, 3, "x") are parsed as JSON."""
    import json

    from transom.errors import OptionError

    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise OptionError(
                f"--template-variable {text} is not NAME=VALUE",
                "Write it like --template-variable enable_thinking=false",
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
