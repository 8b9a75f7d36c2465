"""A run as a file: what ``edgekit benchmark --save`` writes and ``edgekit benchmark compare`` reads.

>>> write_run(Path("run.json"), run)  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgekit.durable import write_durably
from edgekit.errors import ArtifactError, UsageError
from edgekit.schema.base import SCHEMA_VERSION, decode_json
from edgekit.schema.benchmark import BenchmarkRun, ThreadRun


def write_run(path: Path, run: BenchmarkRun) -> None:
    """Keep a run as JSON, one line: the single times would take a line each."""
    write_durably(path, msgspec.json.encode(run, order="deterministic") + b"\n")


def read_run(path: Path) -> BenchmarkRun:
    """A run that :func:`write_run` kept.

    Raises:
        UsageError: ``benchmark.no_such_run``.
        ArtifactError: ``record.malformed`` or ``benchmark.newer_run``.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        hint = 'Write one with "edgekit benchmark MODELS --save FILE".'
        raise UsageError("benchmark.no_such_run", f"{path}: there is no such file.", hint=hint) from error
    run = decode_json(text, BenchmarkRun, name=str(path))
    if run.schema_version > SCHEMA_VERSION:
        message = f"{path}: written by edgekit {run.edgekit_version} in a newer form than this edgekit reads."
        raise ArtifactError("benchmark.newer_run", message, hint="Update edgekit.")
    if not run.runs or any(not _is_complete(run, part) for part in run.runs):
        message = f"{path}: it lacks the times of some of its models."
        raise ArtifactError("record.malformed", message, hint="The file was changed after it was written; make it again.")
    return run


def _is_complete(run: BenchmarkRun, part: ThreadRun) -> bool:
    names = {model.name for model in run.models}
    lengths = {len(times) for times in part.times_ms.values()}
    return (
        run.baseline in names
        and names == part.reports.keys() == part.times_ms.keys()
        and len(lengths) == 1
        and 0 not in lengths
    )
