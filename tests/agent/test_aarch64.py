"""The checks that scripts/emulate-aarch64 runs on another processor hold on this one, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_core_on_this_processor():
    done = subprocess.run(
        [sys.executable, "scripts/aarch64_core.py"], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("ok  ") == 6


def test_emulator_says_why_it_skips(tmp_path):
    """On a machine without Debian's tools nothing is downloaded, and the reason is printed."""
    (tmp_path / "uname").write_text('#!/bin/sh\n[ "$1" = -s ] && echo Linux || echo riscv64\n')
    (tmp_path / "uname").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([ROOT / "scripts" / "emulate-aarch64"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "riscv64" in done.stderr) == (0, True)
    strict = subprocess.run(
        [ROOT / "scripts" / "emulate-aarch64"], env=environment | {"EDGEKIT_NO_SKIPS": "1"}, capture_output=True, check=False
    )
    assert strict.returncode == 1
    assert not (tmp_path / ".cache").exists()
