"""Passes over ONNX files, one a file."""
