"""What the benchmark's models promise, and whether a folder keeps it.

>>> faults(cache / "models" / "minilm")  # doctest: +SKIP
[]
"""

# ruff: noqa: PLC0415  onnx takes a while to import
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import DataError
from edgekit.runtime.ort import load_onnxruntime

PARTS = ("calibration", "evaluation")
FILES = ("model.onnx", "calibration.npz", "evaluation.npz")
OPSETS = range(17, 21)
CALIBRATION, LEAST_EVALUATION = 300, 200
BATCH_TOLERANCE = 1e-3
"""Of the outputs' largest magnitude: kernels sum in another order for another batch."""


def names(cache: Path) -> list[str]:
    """The finished models of a cache folder, sorted."""
    return sorted(path.parent.name for path in cache.glob("models/*/about.json"))


def load_about(folder: Path) -> dict[str, Any]:
    """A model's about.json: kind, metric, license, source, data, samples of each part and sha256 of each file.

    Raises:
        DataError: the folder has none, or it lacks a key.
    """
    hint = 'make it with "python scripts/bench/ptq/zoo.py --cache DIR"'
    try:
        about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("data.unreadable", f"{folder}: about.json cannot be read: {error}.", hint=hint) from error
    if missing := {"kind", "metric", "license", "source", "data", "samples", "sha256"} - about.keys():
        raise DataError("data.unreadable", f"{folder}: about.json lacks {', '.join(sorted(missing))}.", hint=hint)
    return about


def is_whole(folder: Path) -> bool:
    """Whether a model was made by this version's form of about.json and its files are those that were checked."""
    try:
        return bool(load_about(folder)["sha256"] == digests(folder))
    except (DataError, OSError):
        return False


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a model's files, by name."""
    found = {}
    for name in FILES:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def strip(path: Path) -> None:
    """Remove what the exporter notes about this machine: stack traces in metadata, documentation strings."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:]
    model.doc_string = graph.doc_string = ""
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    onnx.save(model, path)


def faults(folder: Path) -> list[str]:
    """What a model and its data do not keep of the promises above; empty when all is well."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    inputs = [value.name for value in model.graph.input]
    parts = {part: dict(np.load(folder / f"{part}.npz")) for part in PARTS}
    found = []
    opset = next(item.version for item in model.opset_import if not item.domain)
    if opset not in OPSETS:
        found.append(f"opset {opset}")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        found.append("external data")
    if any(node.metadata_props or node.doc_string for node in model.graph.node):
        found.append("notes of the exporter")
    for part, arrays in parts.items():
        if arrays.keys() - {"labels"} != set(inputs):
            return [*found, f"{part}.npz has {', '.join(sorted(arrays))}, the model takes {', '.join(inputs)}"]
        if len({len(array) for array in arrays.values()}) != 1:
            return [*found, f"{part}.npz: arrays of different lengths"]
        if not all(np.isfinite(array).all() for array in arrays.values()):
            found.append(f"{part}.npz: values that are not finite")
    counts = [len(arrays[inputs[0]]) for arrays in parts.values()]
    if counts[0] != CALIBRATION:
        found.append(f"{counts[0]} calibration samples, not {CALIBRATION}")
    if counts[1] < LEAST_EVALUATION:
        found.append(f"{counts[1]} evaluation samples, fewer than {LEAST_EVALUATION}")
    rows = [{row.tobytes() for row in arrays[inputs[0]]} for arrays in parts.values()]
    if shared := len(rows[0] & rows[1]):
        found.append(f"{shared} samples in both parts")
    found += [f"{part}.npz: samples twice" for part, own, count in zip(PARTS, rows, counts, strict=True) if len(own) < count]
    return found + _batch_faults(folder / "model.onnx", {name: parts["evaluation"][name][:4] for name in inputs})


def _batch_faults(path: Path, feeds: dict[str, np.ndarray]) -> list[str]:
    session = load_onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    singles = [session.run(None, {name: array[i : i + 1] for name, array in feeds.items()}) for i in range(4)]
    try:
        together = session.run(None, feeds)
    except Exception as error:  # noqa: BLE001  ONNX Runtime has no common class of errors
        return [f"a batch of four does not run: {error}"]
    for one, four in zip(zip(*singles, strict=True), together, strict=True):
        if np.abs(np.concatenate(one) - four).max() > BATCH_TOLERANCE * np.abs(four).max():
            return ["a batch of four gives other outputs than four single samples"]
    return []
