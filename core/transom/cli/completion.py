"""`transom completion`: a shell script that completes commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(
    epilog="""\b
Examples:
  eval "$(transom completion bash)"            # in ~/.bashrc
  eval "$(transom completion zsh)"             # in ~/.zshrc
  transom completion fish > ~/.config/fish/completions/transom.fish
"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL."""
    from transom.cli.app import transom

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(transom, {}, "transom", "_TRANSOM_COMPLETE").source())
