"""What `benchmarks/rtx.py` measures, one idea to a file. None of it needs torch."""
