"""The parts of `benchmarks/rtx.py`, one idea a file. None of it needs torch."""
