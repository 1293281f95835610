"""What benchmarks have in common, one idea to a file. None of it needs torch."""
