"""Deltas between model files: tensors are subtracted where they lie, whatever moved around them."""
