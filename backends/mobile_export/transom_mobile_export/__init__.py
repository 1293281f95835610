"""Transom's backends for phones: `onnx`, a portable ONNX decoder for ONNX Runtime GenAI, and `qnn`, context binaries
for the Hexagon tensor processor of Snapdragon chips."""
