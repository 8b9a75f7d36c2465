"""Latency and memory of models, measured through ``runtime.Session``s, interleaved."""
