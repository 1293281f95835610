"""The parts of `benchmarks/gpu.py`, one idea a file. Modules with torch are imported once the script has set up."""
