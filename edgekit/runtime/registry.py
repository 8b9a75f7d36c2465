"""Which runtime runs which format, loaded when it is asked for.

>>> runtime_of("onnx")
'onnxruntime'
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

from edgekit.errors import UsageError
from edgekit.runtime.session import Session, SessionLoader, SessionOptions
from edgekit.schema.artifact import ModelFormat
from edgekit.schema.target import RuntimeName

_LOADERS: dict[ModelFormat, str] = {"onnx": "edgekit.runtime.ort", "tflite": "edgekit.runtime.litert"}
_RUNTIMES: dict[ModelFormat, RuntimeName] = {"onnx": "onnxruntime", "tflite": "litert"}
_SUFFIXES: dict[str, ModelFormat] = {".onnx": "onnx", ".tflite": "tflite"}
_DISTRIBUTIONS: tuple[tuple[RuntimeName, str], ...] = (
    ("onnxruntime", "onnxruntime"),
    ("litert", "ai-edge-litert"),
    ("litert", "tflite-runtime"),
)


def format_of(path: Path) -> ModelFormat:
    """The format that a file's suffix says.

    Raises:
        UsageError: ``model.unknown_format``.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(
            "model.unknown_format",
            f"{path}: the suffix {path.suffix or '(none)'!s} is no model format.",
            hint=f"edgekit runs {' and '.join(_SUFFIXES)} files.",
        )
    return _SUFFIXES[path.suffix.lower()]


def runtime_of(model_format: ModelFormat) -> RuntimeName:
    """The runtime that runs a format."""
    return _RUNTIMES[model_format]


def installed_runtimes() -> dict[RuntimeName, str]:
    """Version by runtime, without loading any."""
    found: dict[RuntimeName, str] = {}
    for name, distribution in _DISTRIBUTIONS:
        if name not in found:
            try:
                found[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def open_session(
    path: Path,
    *,
    format: ModelFormat | None = None,  # noqa: A002 - the field's word
    options: SessionOptions = SessionOptions(),  # noqa: B008 - frozen
) -> Session:
    """Load a model.

    Args:
        path: a model file, or an open descriptor as ``/proc/self/fd/N`` together with ``format``.
        format: the file's format; from the suffix when not given.
        options: threads and optimization.

    Raises:
        UsageError: ``model.not_found`` or ``model.unknown_format``.
        ArtifactError: ``model.unloadable``.
        EnvironmentFault: ``runtime.missing``.
    """
    model_format = format or format_of(path)
    if not path.exists():
        raise UsageError("model.not_found", f"{path}: there is no such file.", hint="Check the path.")
    loader: SessionLoader = importlib.import_module(_LOADERS[model_format]).load
    return loader(path, options)
