"""``edgekit doctor``: what this machine has, what is missing for which job, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Literal

import typer

from edgekit.cli.console import out, out_json, paint
from edgekit.errors import UsageError
from edgekit.schema.base import Record

Level = Literal["ok", "note", "fault"]
DISTRIBUTION = "edgekit"
JOBS = ("optimize", "agent", "fleet", "inc", "litert-runtime", "litert")
PORTS = {1883: "MQTT broker", 8080: "agent", 8420: "fleet server", 8600: "update repository"}
MIN_FREE_DISK_BYTES = 1_000_000_000
MIN_FREE_RAM_MB = 256.0
_SYMBOLS: dict[Level, str] = {"ok": "✓", "note": "·", "fault": "✗"}

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


class Check(Record, frozen=True, kw_only=True):
    """One thing that was looked at."""

    area: str
    level: Level
    message: str
    hint: str = ""


class Diagnosis(Record, frozen=True, kw_only=True):
    """The whole answer of ``edgekit doctor --json``."""

    checks: tuple[Check, ...]
    is_healthy: bool


def _check_python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Check(area="python", level="ok", message=f"Python {version} at {sys.executable}")


def _requirements(extra: str) -> list[str]:
    """Names of the distributions that an extra asks for on this machine."""
    names = []
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        if f'extra == "{extra}"' not in line.replace("'", '"'):
            continue
        if "platform_machine" in line and os.uname().machine != "x86_64":
            continue
        match = re.match(r"[A-Za-z0-9._-]+", line)
        if match:
            names.append(match.group())
    return names


def _check_extra(extra: str, *, is_wanted: bool) -> Check:
    found, missing = [], []
    for name in _requirements(extra):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if not missing:
        return Check(area=extra, level="ok", message=", ".join(found))
    level: Level = "fault" if is_wanted else "note"
    hint = f"pip install 'edgekit[{extra}]'"
    return Check(area=extra, level=level, message=f"not installed: {', '.join(missing)}", hint=hint)


def _check_targets() -> Check:
    from edgekit.target.load import list_targets
    from edgekit.target.probe import is_host, probe_target

    host = probe_target()
    matching = [profile.name for profile in list_targets() if is_host(profile)]
    fits = f"matches {', '.join(matching)}" if matching else "matches no shipped profile; use --target host"
    text = f"{host.cpu}, {host.cores} cores, {host.ram_mb:.0f} MB, {' '.join(host.isa)}: {fits}"
    return Check(area="hardware", level="ok", message=text)


def _check_memory() -> Check:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    free_mb = int(fields["MemAvailable"].split()[0]) / 1000
    if free_mb < MIN_FREE_RAM_MB:
        return Check(
            area="memory", level="fault", message=f"{free_mb:.0f} MB free", hint=f"free at least {MIN_FREE_RAM_MB:.0f} MB"
        )
    return Check(area="memory", level="ok", message=f"{free_mb:.0f} MB free")


def _check_disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free in {folder}"
    if free < MIN_FREE_DISK_BYTES:
        return Check(area="disk", level="fault", message=text, hint="free at least 1 GB, or work in another folder")
    return Check(area="disk", level="ok", message=text)


def _check_port(port: int, job: str) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            hint = "something listens there already; give another port, or stop it if it is not yours"
            return Check(area="ports", level="note", message=f"{port} ({job}) is in use", hint=hint)
    return Check(area="ports", level="ok", message=f"{port} ({job}) is free")


def _check_frequency() -> Check:
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if not governor.is_file():
        text = "this system does not show its frequency governor; timings state their own noise"
        return Check(area="timing", level="note", message=text)
    name = governor.read_text().strip()
    if name != "performance":
        hint = "for steady timings: cpupower frequency-set -g performance"
        return Check(area="timing", level="note", message=f"frequency governor is {name}", hint=hint)
    return Check(area="timing", level="ok", message="frequency governor is performance")


def diagnose(jobs: tuple[str, ...], folder: Path) -> Diagnosis:
    """Look at everything.

    Args:
        jobs: extras that must be complete; the others are only noted.
        folder: where the work would be written.
    """
    checks = [_check_python(), _check_targets(), _check_memory(), _check_disk(folder), _check_frequency()]
    checks += [_check_extra(extra, is_wanted=extra in jobs) for extra in JOBS]
    checks += [_check_port(port, job) for port, job in PORTS.items()]
    return Diagnosis(checks=tuple(checks), is_healthy=all(check.level != "fault" for check in checks))


@app.command()
def doctor(
    jobs: str = typer.Option("", "--for", metavar="JOBS", help=f"Jobs that must work here, of: {', '.join(JOBS)}."),
    json: bool = typer.Option(False, "--json", help="Print the checks as JSON."),
) -> None:
    """Check this machine: packages, hardware, memory, disk, ports. Exit 1 when something is at fault."""
    wanted = tuple(job.strip() for job in jobs.split(",") if job.strip())
    unknown = [job for job in wanted if job not in JOBS]
    if unknown:
        raise UsageError("doctor.unknown_job", f"--for {unknown[0]}: no such job.", hint=f"Choose from {', '.join(JOBS)}.")
    diagnosis = diagnose(wanted, Path.cwd())
    if json:
        out_json(diagnosis)
    else:
        width = max(len(check.area) for check in diagnosis.checks)
        for check in diagnosis.checks:
            color: Literal["green", "dim", "red"] = {"ok": "green", "note": "dim", "fault": "red"}[check.level]  # type: ignore[assignment]
            out(f"{paint(_SYMBOLS[check.level], color)} {check.area.ljust(width)}  {check.message}")
            if check.hint:
                out(f"  {' ' * width}  → {check.hint}")
    raise typer.Exit(0 if diagnosis.is_healthy else 1)
