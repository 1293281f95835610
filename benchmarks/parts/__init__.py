"""What `benchmarks/gpu.py` and `benchmarks/rtx.py` have in common, one idea to a file. None of it needs torch."""
