"""doctor says what is at fault, and only then its exit code is 1."""

from __future__ import annotations

import socket

import msgspec
import pytest
from typer.testing import CliRunner

from edgekit.cli import doctor
from edgekit.cli.main import main

runner = CliRunner()


def diagnosis(*arguments: str) -> tuple[int, doctor.Diagnosis]:
    result = runner.invoke(doctor.app, ["--json", *arguments])
    return result.exit_code, msgspec.json.decode(result.stdout, type=doctor.Diagnosis)


def test_development_machine_is_healthy():
    code, found = diagnosis("--for", "optimize,agent,fleet")
    assert (code, found.is_healthy) == (0, True)
    assert {"python", "hardware", "memory", "disk", "timing", "ports", "optimize", "agent", "fleet"} <= {
        c.area for c in found.checks
    }


def test_missing_package_is_a_note_unless_the_job_is_wanted(monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda extra: ["no-such-package"] if extra == "litert" else [])
    code, found = diagnosis()
    check = next(c for c in found.checks if c.area == "litert")
    assert (code, check.level) == (0, "note")
    assert "no-such-package" in check.message
    assert "edgekit[litert]" in check.hint
    code, found = diagnosis("--for", "litert")
    assert (code, found.is_healthy) == (1, False)


def test_port_in_use_is_noted(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "agent"})
        _code, found = diagnosis()
    check = next(c for c in found.checks if c.area == "ports")
    assert check.level == "note"
    assert str(port) in check.message


def test_little_memory_and_disk_are_faults(monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE_RAM_MB", 1e12)
    monkeypatch.setattr(doctor, "MIN_FREE_DISK_BYTES", 1e18)
    code, found = diagnosis()
    assert code == 1
    assert {c.area for c in found.checks if c.level == "fault"} == {"memory", "disk"}


def test_unknown_job_is_a_usage_error(capsys):
    assert main(["doctor", "--for", "optimise"]) == 2
    assert "optimise" in capsys.readouterr().err


@pytest.mark.parametrize("extra", doctor.JOBS)
def test_every_job_names_its_packages(extra):
    assert doctor._requirements(extra)
