"""Declared input transforms and streaming feature windows: one implementation for training, batch scoring and the device."""
