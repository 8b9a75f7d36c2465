"""What every pass over ONNX does at its end: write the file and put the step into the lineage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.compiler.calibration import fixed_batch
from edgekit.compiler.graph import write_onnx
from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.dataset.data import Dataset
from edgekit.schema.base import Scalar
from edgekit.schema.candidate import PassStep
from edgekit.schema.digest import digest_bytes, digest_file

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]
CHECKED_SAMPLES = 8


def write_step(
    proto: ModelProto,
    model: WorkModel,
    context: PassContext,
    *,
    name: str,
    precision: str,
    settings: dict[str, Scalar],
    started: float,
    packages: Sequence[str],
    notes: Sequence[str] = (),
) -> WorkModel:
    """Write ``<name>.onnx`` into the pass's folder and give the model with its step; ``started`` is monotonic."""
    path = context.work_dir / f"{name}.onnx"
    data = write_onnx(proto, path)
    step = PassStep(
        name=name,
        settings=settings,
        parent=digest_file(model.path),
        output=digest_bytes(data),
        seconds=time.monotonic() - started,
        versions={package: version(package) for package in packages},
        notes=tuple(notes),
    )
    lineage = (*model.lineage, step)
    return WorkModel(path=path, format="onnx", precision=precision, lineage=lineage, module=model.module)


def sample_feeds(proto: ModelProto, data: Dataset) -> dict[str, Array]:
    """A small batch of calibration samples that the model accepts; the last sample is repeated where there are too few."""
    size = fixed_batch(proto) or min(CHECKED_SAMPLES, len(data))
    chosen = np.minimum(np.arange(size), len(data) - 1)
    return {name: array[chosen] for name, array in data.inputs.items()}
