"""Raw samples for commands: a table becomes features, and a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.errors import DataError

if TYPE_CHECKING:
    from edgekit.dataset.data import Dataset
    from edgekit.features.compute import FeatureTable
    from edgekit.features.program import Program
    from edgekit.schema.contract import Contract
    from edgekit.schema.manifest import Manifest
    from edgekit.schema.tensor import TensorSpec

SHOWN_NOTES = 5
LABEL_COLUMNS = ("labels", "label")
_TABLES = (".csv", ".parquet", ".pq", ".npz")


def is_raw(program: Program, spec: str) -> bool:
    """Whether a file holds the raw columns of these features (and not the model's inputs)."""
    path = Path(spec)
    if path.suffix.lower() not in _TABLES or not path.is_file():
        return False
    from edgekit.dataset.table import read_table

    try:
        return set(program.raw_columns) <= set(read_table(path))
    except DataError:
        return False


def load_for_bundle(
    manifest: Manifest, inputs: Sequence[TensorSpec], spec: str, *, limit: int | None, class_names: tuple[str, ...]
) -> Dataset:
    """Data for a release's model, as a device would take it: features of raw samples, then the contract's reactions.

    Raises:
        DataError: as :func:`edgekit.dataset.load.load_dataset`, and what the contract refuses.
    """
    from edgekit.dataset.load import load_dataset

    data = None
    if manifest.features is not None:
        from edgekit.features.program import Program

        program = Program(manifest.features)
        if is_raw(program, spec):
            table = compute_file(program, Path(spec))
            data = dataset_of(table, program, source=spec, class_names=class_names, limit=limit)
    if data is None:
        data = load_dataset(spec, inputs, limit=limit, class_names=class_names, is_missing_allowed=True)
    return _guarded(manifest.contract, data)


def _guarded(contract: Contract, data: Dataset) -> Dataset:
    """The data after the contract's reactions; what was done is noted."""
    from edgekit.dataset.data import make_dataset
    from edgekit.dataset.guarding import Guard

    if {spec.name for spec in contract.inputs} != set(data.inputs):
        return data
    free = tuple(msgspec.structs.replace(spec, shape=("samples", *spec.shape[1:])) for spec in contract.inputs)
    guarded = Guard(msgspec.structs.replace(contract, inputs=free)).apply(data.inputs)
    notes = [f"contract: {verdict.text}" for verdict in guarded.verdicts if verdict.action != "pass"]
    if not notes:
        return data
    if more := notes[SHOWN_NOTES:]:
        notes = [*notes[:SHOWN_NOTES], f"contract: and {len(more)} columns more"]
    return make_dataset(
        guarded.feeds,
        labels=data.labels,
        class_names=data.class_names,
        source=data.source,
        notes=(*data.notes, *notes),
        columns=data.columns,
    )


def compute_file(program: Program, path: Path, *, label: str = "", group: str = "") -> FeatureTable:
    """The features of a table in a file, with labels and groups where there are columns for them."""
    from edgekit.dataset.table import read_table
    from edgekit.features.compute import compute

    columns = read_table(path)
    for what, name in (("--label", label), ("--group", group)):
        if name and name not in columns:
            raise DataError(
                "data.missing_input", f"{path}: {what} {name}: no such column; found {', '.join(list(columns)[:12])}."
            )
    found = label or next((name for name in LABEL_COLUMNS if name in columns), "")
    labels = columns[found] if found else None
    return compute(columns, program, labels=labels, groups=columns[group] if group else None)


def dataset_of(
    table: FeatureTable, program: Program, *, source: str, class_names: tuple[str, ...], limit: int | None
) -> Dataset:
    """The features as a data set for the model, checked as any other."""
    from edgekit.dataset.fitting import RawData, fit

    raw = RawData(arrays=table.inputs, labels=table.labels, notes=notes_of(table), columns=program.names)
    return fit(raw, program.tensors, source=source, limit=limit, class_names=class_names, is_missing_allowed=True)


def notes_of(table: FeatureTable) -> tuple[str, ...]:
    """What happened on the way: one line where something was lost."""
    counts = table.counters
    faults = {
        "late samples": counts.late,
        "second samples for one place": counts.duplicates,
        "samples without a time": counts.untimed,
        "jumps in time": counts.resets,
        "incomplete windows": counts.incomplete,
        "windows with more than one label": table.mixed_labels,
    }
    found = ", ".join(f"{count} {what}" for what, count in faults.items() if count)
    made = (f"{len(table)} windows of {counts.samples} raw samples",) if counts.samples else ()
    return (*made, *((found,) if found else ()))
