"""One run of one tool on one model: a process of its own, measured, with a time limit, and its record.

What a tool wrote and what it cost lies in DIR/results/MODEL/TOOL/{model.onnx,run.json,log.txt}; a failure keeps its reason in
run.json. Nothing runs twice while that record is there. This module never holds arrays: a child's peak of memory begins at its
parent's.

    >>> run_tool(Path("cache"), "convnet", TOOLS["nncf"]).failure  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peers import LIMIT, Tool, environment_python, installed_version

HERE = Path(__file__).resolve().parent
TIME_LIMIT_S = 600.0
BUDGET_MISSED = 1
"""edgekit's exit status when its own budget is missed; its best candidate is written all the same."""
BYTES_PER_KIB, BYTES_PER_MB = 1024, 1e6
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "NNCF_CI": "1",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "PYTHONWARNINGS": "ignore",
}
"""One thread for OpenMP, and no telemetry from the tools."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Wall time, processor time, and the most resident memory of a process and those that it started."""

    seconds: float
    cpu_seconds: float
    peak_rss_mb: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """What happened: ``failure`` is the last line of error where no model was written.

    ``given`` names the model and the data, or is empty where the tool could not be started: then the next call tries again.
    """

    tool: str
    version: str
    given: str
    cost: Cost
    failure: str | None = None


def read_run(record: Path) -> Run | None:
    """A run's record; None where there is none that this version wrote."""
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        return Run(**{**fields, "cost": Cost(**fields["cost"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def given_to(source: Path) -> str:
    """SHA-256 of a model's files that tools get."""
    digests = []
    for name in ("model.onnx", "calibration.npz"):
        with (source / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)


def run_tool(cache: Path, model: str, tool: Tool, *, is_fresh: bool = False, time_limit_s: float = TIME_LIMIT_S) -> Run:
    """Run one tool on one model, or read what it did before with the same model and data.

    Args:
        cache: the benchmark's folder, with ``models/MODEL``.
        model: the model's name.
        tool: the tool.
        is_fresh: run it again though there is a result.
        time_limit_s: seconds after which it is killed.
    """
    job = Job(cache=cache, model=model, tool=tool)
    record = job.folder / "run.json"
    known = None if is_fresh else read_run(record)
    if known and known.given == given_to(job.source):
        return known
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    _first_samples(job.source / "calibration.npz", job.calibration)
    run = _run(job, time_limit_s)
    record.write_text(json.dumps(asdict(run), indent=1) + "\n", encoding="utf-8")
    return run


@dataclass(frozen=True, kw_only=True)
class Job:
    """One tool on one model."""

    cache: Path
    model: str
    tool: Tool

    @property
    def source(self) -> Path:
        """Where the model lies with its data."""
        return self.cache / "models" / self.model

    @property
    def folder(self) -> Path:
        """Where the result lies."""
        return self.cache / "results" / self.model / self.tool.name

    @property
    def calibration(self) -> Path:
        """The samples that every tool gets."""
        return self.cache / "results" / self.model / "calibration.npz"

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        return environment_python(self.cache, self.tool.family)

    def about(self) -> dict[str, Any]:
        """The model's description."""
        text = (self.source / "about.json").read_text(encoding="utf-8")
        return dict(json.loads(text))

    def command(self) -> list[str]:
        """What is run: a peer's script, or edgekit's command line with the same samples for ranges and evaluation."""
        about, calibration, model = self.about(), str(self.calibration), str(self.source / "model.onnx")
        if self.tool.family == "edgekit":
            code = "import sys; from edgekit.cli.main import run; sys.exit(run())"
            command = [str(self.python), "-c", code, "optimize", model, "--target", "host", "--quiet"]
            command += ["--data", calibration, "--eval", calibration, "--metric", about["metric"]]
            return [*command, "--out", str(self.folder / "out"), "--effort", self.tool.variant]
        script = str(HERE / f"peer_{self.tool.family}.py")
        command = [str(self.python), script, "--model", model, "--calibration", calibration]
        command += ["--out", str(self.folder / "model.onnx"), "--variant", self.tool.variant]
        return command + (["--is-transformer"] if is_transformer(about) else [])


def is_transformer(about: dict[str, Any]) -> bool:
    """Whether a model's description says that it is a transformer."""
    return "transformer" in json.dumps(about).lower()


def _run(job: Job, time_limit_s: float) -> Run:
    cost = Cost(seconds=0.0, cpu_seconds=0.0, peak_rss_mb=0.0)
    if not job.python.exists():
        return Run(tool=job.tool.name, version="", given="", cost=cost, failure="its environment could not be made")
    if job.tool.needs_labels and job.about()["metric"] != "top1":
        failure = "is for labels and top-1 accuracy only"
    else:
        cost, failure = _execute(job, time_limit_s)
    version = installed_version(job.python, job.tool.family)
    return Run(tool=job.tool.name, version=version, given=given_to(job.source), cost=cost, failure=failure)


def _execute(job: Job, time_limit_s: float) -> tuple[Cost, str | None]:
    """Run the tool's command; its cost, and why there is no model."""
    result, log, out = job.folder / "model.onnx", job.folder / "log.txt", job.folder / "out" / "model.onnx"
    code, cost = spend(job.command(), log, time_limit_s)
    is_edgekit = job.tool.family == "edgekit"
    if is_edgekit and out.exists():
        shutil.copy(out, result)
    if result.exists() and (code == 0 or (is_edgekit and code == BUDGET_MISSED)):
        return cost, None
    result.unlink(missing_ok=True)
    is_late = code == -signal.SIGKILL and cost.seconds >= time_limit_s
    return cost, f"took longer than {time_limit_s:g} s" if is_late else last_error(log) or f"exit status {code}"


def spend(command: Sequence[str], log: Path, time_limit_s: float) -> tuple[int, Cost]:
    """Run a command with one OpenMP thread, its output in a file, and measure it.

    Returns:
        Its exit status (negative: the signal that ended it), and what it cost.
    """
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        timer = threading.Timer(time_limit_s, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds, peak_mb = time.monotonic() - started, usage.ru_maxrss * BYTES_PER_KIB / BYTES_PER_MB
    return process.returncode, Cost(seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime, peak_rss_mb=peak_mb)


def last_error(log: Path) -> str:
    """The last line of a log that says something, at most 300 characters."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if any(character.isalpha() for character in line)]
    errors = [line for line in lines if "error" in line.lower() and not line.startswith("File ")]
    return (errors or lines or [""])[-1][:300]


def _first_samples(source: Path, target: Path) -> None:
    """A file of the first 300 samples, made in a child: arrays held here would count in every tool's peak of memory."""
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        child = multiprocessing.get_context("fork").Process(target=_cut, args=(source, target))
        child.start()
        child.join()
        if child.exitcode:
            raise RuntimeError(f"{source}: cannot be read.")


def _cut(source: Path, target: Path) -> None:
    import numpy as np  # noqa: PLC0415 - in a child only

    with np.load(source, allow_pickle=False) as file:
        rows = {name: file[name] for name in file.files}
    arrays = {name: array if name == "class_names" else array[:LIMIT] for name, array in rows.items()}
    np.savez(target, **arrays)
