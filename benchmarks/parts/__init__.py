"""What benchmarks share, one idea a file. None of it needs torch."""
