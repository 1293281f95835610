"""Transom's backends for phones: `genai`, a portable ONNX decoder for ONNX Runtime GenAI, and `htp`, context binaries
for the Hexagon tensor processor of Snapdragon chips."""
