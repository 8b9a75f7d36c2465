"""Read ``.npz``: one array per model input by name, axis 0 is the sample; optional ``labels`` and ``class_names``.

Pickled objects are never loaded.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgekit.dataset.data import Array
from edgekit.dataset.fitting import LABELS_NAME, RawData
from edgekit.errors import DataError
from edgekit.schema.tensor import TensorSpec

CLASS_NAMES_NAME = "class_names"


def read_npz(path: Path, inputs: Sequence[TensorSpec]) -> RawData:
    """Read every array of the file.

    Raises:
        DataError: ``data.unreadable`` when it is no ``.npz``, is damaged, or holds pickled objects.
    """
    wanted = {spec.name for spec in inputs}
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Array] = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive raises whatever zipfile, zlib and numpy run into
        is_pickled = "allow_pickle" in str(error)
        what = "it holds pickled objects, which are never loaded" if is_pickled else f"not a readable .npz file: {error}"
        hint = "Save plain numeric arrays; pad or crop samples of different shapes."
        raise DataError(
            "data.unreadable",
            f"{path}: {what.rstrip('.')}.",
            hint=hint if is_pickled else "Write it with numpy.savez_compressed.",
        ) from error
    labels = None if LABELS_NAME in wanted else arrays.pop(LABELS_NAME, None)
    names = None if CLASS_NAMES_NAME in wanted else arrays.pop(CLASS_NAMES_NAME, None)
    return RawData(
        arrays=arrays, labels=labels, class_names=() if names is None else tuple(str(name) for name in names.reshape(-1))
    )
