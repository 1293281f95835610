"""Shared modules of the benchmarks, one idea a file. None of them needs torch."""
