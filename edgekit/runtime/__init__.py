"""Run a model: one ``Session`` protocol over ONNX Runtime and LiteRT."""
