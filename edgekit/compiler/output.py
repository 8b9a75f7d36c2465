"""The output folder: never half-written, never somebody else's.

A run works in ``DIR/.work``, writes its result into a folder beside DIR and swaps the two at the end, so that DIR always has
one whole result. A folder with files that edgekit did not write is refused, since the swap would remove them.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from edgekit.errors import EnvironmentFault, UsageError

WORK = ".work"
LATENCY_TABLE = "latency-table.json"
OWN_NAMES = frozenset(
    {"candidate.json", "candidates", "model.onnx", "model.tflite", "report.html", "report.json", LATENCY_TABLE, WORK}
)


def default_out(stem: str, target: str) -> Path:
    """``edgekit-out/<model>-<target>`` below the working folder."""
    name = re.sub(r"[^\w.-]+", "-", f"{stem}-{target}").strip("-.")
    return Path("edgekit-out") / name


def check_out(path: Path) -> None:
    """Refuse a place that is not ours to replace.

    Raises:
        UsageError: ``output.foreign`` when it holds other files, or is a file.
    """
    hint = "Give an empty or a new folder by --out."
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError("output.foreign", f"{path}: is not a folder.", hint=hint)
    if not path.exists():
        return
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in OWN_NAMES)
    if foreign:
        shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise UsageError("output.foreign", f"{path}: holds files that edgekit did not write ({shown}).", hint=hint)


def open_work(path: Path) -> Path:
    """The working folder of a run, made where it is missing.

    Raises:
        EnvironmentFault: ``output.not_writable``.
    """
    work = path / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            "output.not_writable", f"{path}: cannot be written: {error.strerror}.", hint="Give another folder by --out."
        ) from error
    return work


def open_staging(path: Path) -> Path:
    """An empty folder beside the output folder; one that a killed run left is replaced."""
    staging = path.with_name(f".{path.name}.new")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def swap_in(staging: Path, path: Path) -> None:
    """Put the new result in the old one's place; steps that are kept move with it."""
    old = path.with_name(f".{path.name}.old")
    if old.exists():
        shutil.rmtree(old)
    _sync_tree(staging)
    if (path / WORK).is_dir():
        (path / WORK).rename(staging / WORK)
    if path.exists():
        path.rename(old)
    try:
        staging.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _sync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def _sync_tree(folder: Path) -> None:
    for entry in folder.rglob("*"):
        _sync(entry)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
