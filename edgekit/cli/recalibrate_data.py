"""Field samples on disk, and how far they lie from the baseline. What devices gave is kept readable by its owner only."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgekit.dataset.data import Array, Dataset, make_dataset
from edgekit.dataset.field import FieldData
from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.errors import DataError
from edgekit.schema.contract import Contract
from edgekit.schema.recalibration import StreamShift
from edgekit.schema.tensor import TensorSpec

if TYPE_CHECKING:
    from edgekit.runtime.session import Session
    from edgekit.schema.baseline import ReferenceProfile

FIELD_FILE = "field.npz"
_DEVICES, _TIMES, _SKIPPED, _FIELD_LABELS = "__devices", "__times_ms", "__skipped", "__labels"


def specs_of(contract: Contract) -> tuple[TensorSpec, ...]:
    """What data for this contract must have."""
    return tuple(TensorSpec(name=each.name, dtype=each.dtype, shape=each.shape) for each in contract.inputs)


def save_field(folder: Path, found: FieldData) -> None:
    """Write field samples, for their owner's eyes only."""
    extra = {
        _DEVICES: np.asarray(found.devices, dtype=np.str_),
        _TIMES: found.times_ms,
        _FIELD_LABELS: found.labels,
        _SKIPPED: np.frombuffer(msgspec.json.encode(found.skipped), np.uint8),
    }
    save_arrays(folder / FIELD_FILE, found.data.inputs | extra)


def load_field(folder: Path, contract: Contract) -> FieldData:
    """What :func:`save_field` wrote.

    Raises:
        DataError: ``data.unreadable``.
    """
    path = folder / FIELD_FILE
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Array] = {name: file[name] for name in file.files}
        skipped = msgspec.json.decode(arrays.pop(_SKIPPED).tobytes(), type=dict[str, int])
        devices, times, labels = arrays.pop(_DEVICES), arrays.pop(_TIMES), arrays.pop(_FIELD_LABELS)
    except (OSError, ValueError, KeyError) as error:
        raise DataError("data.unreadable", f"{path}: {error}.", hint="Remove the job folder and run again.") from error
    columns = {each.name: tuple(column.name for column in each.columns) for each in contract.inputs if each.columns}
    return FieldData(
        data=make_dataset(arrays, class_names=contract.labels, source="field samples", columns=columns),
        labels=labels,
        devices=tuple(map(str, devices)),
        times_ms=times,
        skipped=skipped,
    )


def save_arrays(path: Path, arrays: dict[str, Array]) -> None:
    """Write an ``.npz``, readable by its owner only."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_durably(path, content.getvalue(), mode=PRIVATE_FILE)


def save_dataset(path: Path, data: Dataset) -> None:
    """Write a data set as ``load_dataset`` reads it."""
    arrays = dict(data.inputs)
    if data.labels is not None:
        arrays["labels"] = data.labels
    if data.class_names:
        arrays["class_names"] = np.asarray(data.class_names)
    save_arrays(path, arrays)


def measure_shift(profile: ReferenceProfile, data: Dataset, model: Session) -> tuple[StreamShift, ...]:
    """PSI of each stream of the baseline on these samples, the largest first."""
    from edgekit.evaluation.evaluate import predict
    from edgekit.monitor.compare import compare, shares
    from edgekit.monitor.sketch import Sketcher, cells_of, decode_counts

    sketcher = Sketcher(profile)
    sketcher.observe(data.inputs, predict(model, data))
    found = []
    for stream, sketch in zip(profile.streams, sketcher.take(), strict=True):
        counts = decode_counts(sketch, cells=cells_of(stream))
        reference = np.asarray(stream.counts)
        now = counts if stream.kind == "classes" else counts[:-1]
        if not reference.sum() or not now.sum():
            continue
        shown = stream.kind != "classes"
        found.append(
            StreamShift(
                name=stream.name,
                psi=compare(reference, now).psi,
                edges=stream.edges if shown else (),
                reference=tuple(shares(reference).tolist()) if shown else (),
                field=tuple(shares(now).tolist()) if shown else (),
            )
        )
    return tuple(sorted(found, key=lambda each: -each.psi))
