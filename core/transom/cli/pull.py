"""`transom pull`: downloads a model from the Hugging Face hub into the hub's own cache, and prints its path."""

from __future__ import annotations

from pathlib import Path

import click

from transom.cli.options import JSON, QUIET, complete_hub
from transom.cli.output import ProgressLine, aside, print_json, warn


@click.command(
    epilog="""\b
Examples:
  transom pull Qwen/Qwen2.5-0.5B-Instruct
  transom pull bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
  transom pull onnx-community/Qwen2.5-0.5B-Instruct:onnx/model_q4.onnx
  transom pull Qwen/Qwen2.5-0.5B-Instruct@refs/pr/1
  transom run "$(transom pull -q Qwen/Qwen2.5-0.5B-Instruct)" "Hello"

Needs pip install 'transom[hub]'. HF_HOME, HF_TOKEN and the other variables of huggingface_hub apply.
"""
)
@click.argument("name", shell_complete=complete_hub)
@QUIET
@JSON
def pull(name: str, quiet: bool, as_json: bool) -> None:
    """Download a model from the Hugging Face hub and print its path.

    NAME is owner/name, followed by :FILE or :QUANTIZATION to choose one of several GGUF or ONNX files, and by @REVISION
    for a branch, tag or commit. Only the files that the model needs are fetched, into the cache of huggingface_hub. A
    download that was cut continues where it stopped.

    Other commands take the same names in place of a path, and download what is missing.
    """
    from transom.sources import hub, hub_names

    wanted = hub_names.parse(name)
    with ProgressLine(quiet=quiet, stage="list") as progress:
        pulled = hub.pull(wanted, progress=progress, announce=progress.say)
    if Path(name).exists():
        warn(f"{name} is also a path here, which other commands take first")
    if as_json:
        print_json({"name": str(wanted), **vars(pulled)})
        return
    if not quiet and not pulled.downloaded:
        aside("Nothing to download: it is up to date.")
    click.echo(pulled.path)
