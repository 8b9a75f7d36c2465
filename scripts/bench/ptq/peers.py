"""The tools of the post-training-quantization benchmark: what each needs, and its environment.

A family of tools shares one virtual environment, made on first use; edgekit runs in the benchmark's own. The peers' scripts
import this module for their arguments and samples, so that it imports nothing outside the standard library when loaded.

    >>> TOOLS["nncf"].family
    'nncf'
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 300
"""Calibration samples that every tool gets."""
LABELS = "labels"
TORCH = "torch==2.13.0"
PACKAGES: dict[str, tuple[str, ...]] = {
    "ort": ("onnxruntime", "onnx", "sympy"),
    "nncf": ("nncf", "onnx", "onnxruntime"),
    "olive": (TORCH, "olive-ai", "onnxruntime", "requests"),
    "inc": (TORCH, "neural-compressor[pt]", "onnx2torch", "onnxscript", "onnxruntime"),
}
MAIN_PACKAGE = {"ort": "onnxruntime", "nncf": "nncf", "olive": "olive-ai", "inc": "neural-compressor", "edgekit": "edgekit"}


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One row of the table: a family (which has one environment) and the variant of its use."""

    name: str
    family: str
    variant: str
    needs_labels: bool = False


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(name="ort-default", family="ort", variant="default"),
        Tool(name="ort-good", family="ort", variant="good"),
        Tool(name="ort-percentile", family="ort", variant="percentile"),
        Tool(name="ort-dynamic", family="ort", variant="dynamic"),
        Tool(name="nncf", family="nncf", variant="default"),
        Tool(name="nncf-accuracy", family="nncf", variant="accuracy", needs_labels=True),
        Tool(name="olive", family="olive", variant="default"),
        Tool(name="inc", family="inc", variant="default"),
        Tool(name="edgekit-fast", family="edgekit", variant="fast"),
        Tool(name="edgekit", family="edgekit", variant="default"),
    )
}


# --- for the peers' scripts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PeerArguments:
    """The arguments of every peer's script."""

    model: Path
    calibration: Path
    out: Path
    variant: str
    is_transformer: bool


def peer_arguments(arguments: Sequence[str], variants: Sequence[str]) -> PeerArguments:
    """Parse a peer script's command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--is-transformer", action="store_true")
    return PeerArguments(**vars(parser.parse_args(arguments)))


def input_names(model: Any) -> list[str]:
    """The inputs of an onnx.ModelProto that are not weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value.name for value in model.graph.input if value.name not in weights]


def samples(path: Path, names: Sequence[str], *, with_labels: bool = False) -> list[dict[str, Any]]:
    """The first 300 samples, each a batch of one by input name; with its label under ``labels`` on demand."""
    import numpy as np  # noqa: PLC0415 - the benchmark's own process stays small: a child's peak begins at its parent's

    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name if name in file.files else "inputs"][:LIMIT] for name in names}
        labels = file[LABELS][:LIMIT] if with_labels else None
    count = len(next(iter(arrays.values())))
    rows: list[dict[str, Any]] = [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)]
    if labels is not None:
        rows = [{**row, LABELS: labels[i]} for i, row in enumerate(rows)]
    return rows


# --- environments -----------------------------------------------------------------------------------------------------------


def environment_python(cache: Path, family: str) -> Path:
    """The interpreter that runs a family's tools; edgekit's is this one."""
    return Path(sys.executable) if family == "edgekit" else cache / f"venv-peers-{family}" / "bin" / "python"


def make_environment(cache: Path, family: str) -> None:
    """Make a family's virtual environment with the newest versions, where it is missing.

    Raises:
        subprocess.CalledProcessError: when a package cannot be installed; the environment is made anew the next time.
    """
    python = environment_python(cache, family)
    stamp = python.parent.parent / "complete"
    if family == "edgekit" or stamp.exists():
        return
    folder = python.parent.parent
    print(f"installing {' '.join(PACKAGES[family])} in {folder}", file=sys.stderr)
    log = cache / f"venv-peers-{family}.log"
    uv = shutil.which("uv")
    steps: list[list[str]] = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "-q"],
    ]
    if uv:
        steps = [
            [uv, "venv", "--clear", "-q", "-p", sys.executable, str(folder)],
            [uv, "pip", "install", "-q", "-p", str(python)],
        ]
    with log.open("wb") as file:
        for step in (steps[0], [*steps[1], *PACKAGES[family]]):
            subprocess.run(step, check=True, stdout=file, stderr=subprocess.STDOUT)
    stamp.touch()


def installed_version(python: Path, family: str) -> str:
    """The version of a family's main package."""
    code = f"import importlib.metadata as m; print(m.version({MAIN_PACKAGE[family]!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
