"""File names, shared by compile and load."""

from __future__ import annotations

DECODER_FILE = "decoder.json"
CODE_LIST = "kernels.json"
CODE_FILE = "kernels.bin"


def program_file(rank: int) -> str:
    """Program file of one card's share; a single card has share 0."""
    return f"program-{rank}.json"


def weights_file(rank: int) -> str:
    return f"weights-{rank}.bin"
