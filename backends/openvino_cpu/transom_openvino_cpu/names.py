"""Names of inputs and files, shared by compile and load."""

from __future__ import annotations

PAST_LENGTHS = "past_lens"
BEGINS = "subsequence_begins"
PAGES = "block_indices"
PAGE_BEGINS = "block_indices_begins"
LONGEST = "max_context_len"

PLAN_FILE = "session.json"
PROGRAM_FILE = "program.json"
WEIGHTS_FILE = "weights.bin"
PAGE_TOKENS = 32
"""Tokens in a page of OpenVINO's PagedAttention on a CPU."""


def cache_inputs(layer: int) -> tuple[str, str]:
    return f"key_cache.{layer}", f"value_cache.{layer}"
