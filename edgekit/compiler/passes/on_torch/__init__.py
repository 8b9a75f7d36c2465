"""Passes over torch modules: export to ONNX, pruning with distillation."""
