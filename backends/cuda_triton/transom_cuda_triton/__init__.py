"""Decoders on NVIDIA GPUs by Triton kernels: block-sparse attention over a paged cache, quantised weights."""
