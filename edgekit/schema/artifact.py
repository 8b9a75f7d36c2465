"""A model file: where it is, what it hashes to, what it takes and gives."""

from __future__ import annotations

from typing import Literal

from edgekit.schema.base import Record
from edgekit.schema.digest import Digest
from edgekit.schema.tensor import TensorSpec

ModelFormat = Literal["onnx", "tflite"]


class ModelArtifact(Record, frozen=True, kw_only=True):
    """One model file; ``path`` is relative to the record that names it."""

    path: str
    digest: Digest
    size_bytes: int
    format: ModelFormat
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str = "fp32"
    parameters: int | None = None
