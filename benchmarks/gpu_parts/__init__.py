"""What `benchmarks/gpu.py` measures, one idea to a file. Nothing here is imported before the script has set up."""
