"""Peak memory of a process that loads and runs one model.

A process's peak is its own for life, so each model gets a fresh child. The figure is the kernel's high-water mark of resident
memory (``VmHWM``), interpreter and runtime included: what a device must have free. ``getrusage`` would not do: after a fork it
starts from the parent's peak.

    >>> measure_peak_rss(Path("model.onnx"), feeds)  # doctest: +SKIP
    61.4
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from edgekit.errors import EdgekitError
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import Array, SessionOptions

RUNS = 5
TIMEOUT_SECONDS = 120.0
_STATUS = Path("/proc/self/status")


def own_peak_rss_mb() -> float | None:
    """The high-water mark of this process's resident memory, megabytes; None where the system does not tell."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), None)


def _run_child(answer: Connection, path: Path, feeds: Mapping[str, Array], options: SessionOptions) -> None:
    try:
        session = open_session(path, options=options)
        for _ in range(RUNS):
            session.run(feeds)
        answer.send(own_peak_rss_mb())
    except EdgekitError as error:
        answer.send(error)


def measure_peak_rss(
    path: Path,
    feeds: Mapping[str, Array],
    *,
    options: SessionOptions = SessionOptions(),  # noqa: B008 - frozen
    timeout: float = TIMEOUT_SECONDS,
) -> float | None:
    """Load a model in a child process, run it a few times, and ask for the peak.

    Args:
        path: the model file.
        feeds: one request by input name.
        options: threads and optimization.
        timeout: seconds after which the child is ended.

    Returns:
        Megabytes (10^6 bytes); None where the system does not tell, or when the child crashed or took too long.

    Raises:
        EdgekitError: what loading or running raised in the child.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_run_child, args=(theirs, path, dict(feeds), options), daemon=True)
    child.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(timeout) else None
    except EOFError:
        answer = None
    finally:
        ours.close()
        child.join(1.0)
        if child.is_alive():
            child.kill()
            child.join()
    if isinstance(answer, EdgekitError):
        raise answer
    return answer if isinstance(answer, float) else None
