"""Rounding weights and activations to few bits: how one matrix is rounded, what activations are like, and the passes
that write both into a graph. Nothing here knows a backend.

Importing this package imports nothing: name the module, `transom.quantize.passes`.
"""
