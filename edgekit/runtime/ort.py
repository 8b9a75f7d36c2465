"""Sessions over ONNX Runtime's CPU provider.

ONNX Runtime 1.32 writes a device identifier and an event store under the user's cache folder as soon as it is imported, and
sends events from there. Only ``ORT_DISABLE_TELEMETRY=1`` in the environment before the import prevents the files;
``disable_telemetry_events()`` comes too late for that. So ONNX Runtime is imported through :func:`load_onnxruntime` only.

    >>> session = OrtSession(Path("model.onnx"), SessionOptions(threads=2))  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import ArtifactError, EnvironmentFault
from edgekit.runtime.feeds import check_feeds
from edgekit.runtime.session import Array, SessionOptions
from edgekit.schema.tensor import DType, TensorSpec

_DTYPES: dict[str, DType] = {
    "tensor(bool)": "bool",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int16)": "int16",
    "tensor(uint16)": "uint16",
    "tensor(int32)": "int32",
    "tensor(uint32)": "uint32",
    "tensor(int64)": "int64",
    "tensor(uint64)": "uint64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
}
_FATAL_ONLY = 4


def load_onnxruntime() -> Any:
    """The onnxruntime module, with its telemetry off.

    Raises:
        EnvironmentFault: ``runtime.missing``.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime  # noqa: PLC0415 - only after the switch above, and only where a model runs
    except ImportError as error:
        raise EnvironmentFault(
            "runtime.missing",
            f"onnxruntime cannot be imported: {error}.",
            hint="pip install 'edgekit[agent]' on a device, 'edgekit[optimize]' on a workstation.",
        ) from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _spec(argument: Any, path: Path) -> TensorSpec:
    if argument.type not in _DTYPES:
        raise ArtifactError(
            "model.unsupported_type",
            f"{path}: {argument.name!r} is {argument.type}; edgekit handles dense tensors of numbers only.",
        )
    shape = tuple(axis if isinstance(axis, int) else (axis or f"axis{i}") for i, axis in enumerate(argument.shape))
    return TensorSpec(name=argument.name, dtype=_DTYPES[argument.type], shape=shape)


class OrtSession:
    """One model in ONNX Runtime: CPU provider, sequential execution, ``threads`` intra-op threads."""

    def __init__(self, path: Path, options: SessionOptions) -> None:
        ort = load_onnxruntime()
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        if options.threads > 1:  # workers that spin between runs take the processor from whatever runs next, for nothing
            settings.add_session_config_entry("session.force_spinning_stop", "1")
        settings.log_severity_level = _FATAL_ONLY  # errors come back as exceptions; printing them too is noise
        levels = ort.GraphOptimizationLevel
        settings.graph_optimization_level = levels.ORT_ENABLE_ALL if options.is_optimized else levels.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ArtifactError(
                "model.unloadable",
                f"{path}: ONNX Runtime {ort.__version__} cannot load it: {_first_line(error)}.",
                hint="Check that it is a complete .onnx file whose operators this version of ONNX Runtime has.",
            ) from error
        self._name = path.name
        self._version = str(ort.__version__)
        self._inputs = tuple(_spec(argument, path) for argument in self._session.get_inputs())
        self._outputs = tuple(_spec(argument, path) for argument in self._session.get_outputs())
        self._output_names = [spec.name for spec in self._outputs]

    @property
    def runtime(self) -> str:
        """``onnxruntime``."""
        return "onnxruntime"

    @property
    def runtime_version(self) -> str:
        """The version of ONNX Runtime."""
        return self._version

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs."""
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see :meth:`edgekit.runtime.session.Session.run`."""
        check_feeds(feeds, self._inputs, name=self._name)
        try:
            values = self._session.run(self._output_names, dict(feeds))
        except Exception as error:
            raise ArtifactError("model.run_failed", f"{self._name}: ONNX Runtime failed: {_first_line(error)}.") from error
        return {name: np.asarray(value) for name, value in zip(self._output_names, values, strict=True)}

    def close(self) -> None:
        """Free the model."""
        del self._session


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:400]


def load(path: Path, options: SessionOptions) -> OrtSession:
    """Load an ``.onnx`` file; see :class:`edgekit.runtime.session.SessionLoader`."""
    return OrtSession(path, options)
