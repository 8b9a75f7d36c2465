"""ONNX Runtime leaves no identifier behind and opens no connection, whatever edgekit does with it.

The process under test gets an empty home and a seccomp filter that kills it on the first ``socket(AF_INET | AF_INET6)`` or
``connect``, from whichever thread and language it comes.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CI_NAMES = {"CI", "TF_BUILD", "GITHUB_ACTIONS", "TRAVIS", "JENKINS_URL", "CODEBUILD_BUILD_ID"}
"""ONNX Runtime keeps quiet by itself where it finds one of these: without them the tests see what a user's machine sees."""
FILTER = """
import ctypes, struct
NUMBERS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # audit architecture, number of socket(2)
def forbid_internet(machine):
    arch, socket_call = NUMBERS[machine]
    program = [  # code, jump if true, jump if false, operand
        (0x20, 0, 0, 4), (0x15, 0, 6, arch),            # the other architecture's calls: allowed
        (0x20, 0, 0, 0), (0x15, 0, 4, socket_call),     # anything but socket(2): allowed
        (0x20, 0, 0, 16), (0x15, 1, 0, 2), (0x15, 0, 1, 10),  # its first argument: AF_INET or AF_INET6
        (0x06, 0, 0, 0x80000000),                       # kill the process
        (0x06, 0, 0, 0x7FFF0000),                       # allow
    ]
    data = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(data)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0, "no_new_privs"
    assert libc.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()
"""
RUN_MODEL = """
import sys, time
from pathlib import Path
import numpy as np
from edgekit.runtime.registry import open_session
session = open_session(Path(sys.argv[1]))
for _ in range(20):
    session.run({"image": np.zeros((1, 1, 28, 28), np.float32)})
session.close()
time.sleep(1)  # a background thread would have its chance
print("done")
"""


def run_python(home: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_")) and name not in CI_NAMES}
    environment = {**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home)}
    guarded = f"{FILTER}\nforbid_internet({platform.machine()!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", guarded, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def home(tmp_path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def left_behind(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_running_a_model_leaves_no_file_and_opens_no_connection(home, sample_dir):
    done = run_python(home, RUN_MODEL, str(sample_dir / "model.onnx"))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert left_behind(home) == []


def test_benchmark_command_leaves_no_file_and_opens_no_connection(home, sample_dir):
    model = str(sample_dir / "model.onnx")
    code = f"""
from edgekit.cli.main import main
raise SystemExit(main(["benchmark", {model!r}, "--seconds", "0", "--runs", "3"]))
"""
    done = run_python(home, code)
    assert done.returncode == 0, done.stderr
    assert left_behind(home) == []


def test_filter_kills_who_opens_a_connection(home):
    """The guard itself: without this the two tests above could not fail."""
    done = run_python(home, "import socket; socket.socket(socket.AF_UNIX).close(); print(1, flush=True); socket.socket()")
    assert done.stdout == "1\n"
    assert done.returncode == -signal.SIGSYS


def test_onnxruntime_alone_would_leave_files(home):
    """What the switch is for: when a later ONNX Runtime leaves nothing, this tells us and the switch can go."""
    code = 'import onnxruntime; onnxruntime.disable_telemetry_events(); print("done")'
    done = run_python(home, code)
    assert done.returncode == 0
    assert any(name.endswith("deviceid") for name in left_behind(home))
