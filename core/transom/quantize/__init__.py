"""Quantizes weights and activations: quantization of one matrix, calibration of activations, and passes over a graph.

Independent of backends. Importing this package imports nothing: import a module, such as `transom.quantize.passes`.
"""
