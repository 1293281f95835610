"""What `benchmarks/gpu.py` measures, one idea to a file. What imports torch is imported once the script has set up."""
