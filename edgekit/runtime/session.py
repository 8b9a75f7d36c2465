"""The ``Session`` protocol: one loaded model, whatever runs it.

    >>> from edgekit.runtime.registry import open_session
    >>> session = open_session(Path("model.onnx"))  # doctest: +SKIP
    >>> session.run({"image": image})["logits"]     # doctest: +SKIP

A session is safe to use from one thread at a time. ``run`` never changes its feeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from edgekit.schema.tensor import TensorSpec

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How to load: intra-op ``threads``; ``is_optimized`` False switches the runtime's own graph optimization off."""

    threads: int = 1
    is_optimized: bool = True


@runtime_checkable
class Session(Protocol):
    """A loaded model."""

    @property
    def runtime(self) -> str:
        """``onnxruntime`` or ``litert``."""

    @property
    def runtime_version(self) -> str:
        """The runtime's version."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Args:
            feeds: every input by name, of the declared type; axis 0 is the batch.

        Returns:
            Every output by name.

        Raises:
            DataError: ``data.shape``, ``data.dtype`` or ``data.missing_input`` when a feed does not fit.
            ArtifactError: ``model.run_failed`` when the runtime fails.
        """

    def close(self) -> None:
        """Free the model; a closed session must not be used."""


class SessionLoader(Protocol):
    """Loads a file (or an open descriptor's ``/proc/self/fd/N`` path) into a session."""

    def __call__(self, path: Path, options: SessionOptions) -> Session:
        """Load it.

        Raises:
            ArtifactError: ``model.unloadable`` when the runtime refuses the file.
            EnvironmentFault: ``runtime.missing`` when the runtime is not installed.
        """
