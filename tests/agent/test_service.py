"""The systemd unit: what it says, and what systemd itself says of it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.agent.config import AgentConfig, ModelConfig, ResourcesConfig, check_config
from edgekit.agent.service import make_unit
from edgekit.errors import UsageError

CONFIG = AgentConfig(device="cam-7", state_dir="/var/lib/edgekit")
FILE = Path("/etc/edgekit/agent.toml")
PYTHON = "/usr/bin/python3"
ANALYZE = shutil.which("systemd-analyze")
MUST = {
    "Type": "notify",
    "NotifyAccess": "main",
    "Restart": "always",
    "OOMPolicy": "continue",
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "MemoryDenyWriteExecute": "yes",
    "CapabilityBoundingSet": "",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "PrivateDevices": "yes",
    "UMask": "0077",
}


def unit_of(config=CONFIG, **more) -> str:
    return make_unit(config, command=(PYTHON, "-P", "-m", "edgekit"), **({"file": FILE} | more))


def parse(unit: str) -> dict[str, list[str]]:
    """Every setting of [Service]; a line that is none fails."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in unit.splitlines():
        if line.startswith("["):
            section = line
        elif line:
            name, separator, value = line.partition("=")
            assert separator, line
            assert name.isalnum(), line
            if section == "[Service]":
                found.setdefault(name, []).append(value)
    return found


def test_unit_is_hardened():
    found = parse(unit_of())
    assert {name: found[name] for name in MUST} == {name: [value] for name, value in MUST.items()}
    assert found["SystemCallFilter"] == ["@system-service", "~@privileged"]
    assert found["ExecStart"] == [f"{PYTHON} -P -m edgekit agent run --config {FILE}"]
    assert found["StateDirectory"] == ["edgekit"]
    assert found["DynamicUser"] == ["yes"]
    assert found["ProtectHome"] == ["yes"]
    assert 60 <= int(found["WatchdogSec"][0]) <= 600


def test_secrets_reach_a_dynamic_user_as_credentials():
    config = AgentConfig(device="cam", state_dir="/var/lib/edgekit", key_file="/etc/edgekit/key.pem")
    found = parse(unit_of(config))
    assert found["LoadCredential"] == ["key_file:/etc/edgekit/key.pem"]
    assert found["Environment"] == ["EDGEKIT_AGENT_KEY_FILE=%d/key_file"]
    named = parse(unit_of(config, user="edge"))
    assert named["User"] == ["edge"]
    assert "LoadCredential" not in named


def test_credential_of_systemd_is_private_whatever_its_mode_looks_like(tmp_path, monkeypatch):
    identity = tmp_path / "age_identity"
    identity.write_text("AGE-SECRET-KEY-1")
    identity.chmod(0o440)
    config = AgentConfig(device="cam", state_dir="/x", age_identity=str(identity))
    with pytest.raises(UsageError):
        check_config(config)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    check_config(config)


def test_limits_come_from_the_settings():
    config = AgentConfig(
        device="cam",
        state_dir="/srv/agent",
        resources=ResourcesConfig(memory_max_mb=200, cpu_percent=75),
        models={"b": ModelConfig(), "c": ModelConfig()},
        selftest_timeout_s=100,
    )
    found = parse(unit_of(config))
    assert found["MemoryMax"] == ["200000000"]
    assert found["CPUQuota"] == ["75%"]
    assert found["ReadWritePaths"] == ["/srv/agent"]
    assert found["TimeoutStartSec"] == ["360"]
    assert "MemoryMax" not in parse(unit_of())


def test_program_in_a_home_is_seen():
    unit = make_unit(CONFIG, command=("/home/pi/venv/bin/python", "-m", "edgekit"))
    assert parse(unit)["ProtectHome"] == ["read-only"]


def test_names_that_systemd_would_expand():
    unit = make_unit(CONFIG, command=("/opt/my python/bin/python", "-m", "edgekit"), file=Path("/etc/100%/a$b.toml"))
    assert parse(unit)["ExecStart"] == ['"/opt/my python/bin/python" -m edgekit agent run --config /etc/100%%/a$$b.toml']
    with pytest.raises(UsageError):
        make_unit(CONFIG, command=(PYTHON,), file=Path("/etc/a\nExecStartPre=/bin/evil"))
    with pytest.raises(UsageError) as caught:
        make_unit(CONFIG, command=(PYTHON,), file=Path("agent.toml"))
    assert caught.value.code == "service.relative"


@pytest.mark.parametrize("user", ["", "daemon"])
def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path, user):
    """Where systemd is not installed, the parsed unit above is all that can be said."""
    config = AgentConfig(
        device="cam-7",
        state_dir="/var/lib/edgekit",
        key_file="/etc/edgekit/key.pem",
        resources=ResourcesConfig(memory_max_mb=300, cpu_percent=80),
    )
    path = tmp_path / "edgekit-agent.service"
    path.write_text(make_unit(config, command=(sys.executable, "-P", "-m", "edgekit"), file=FILE, user=user))
    parse(path.read_text())
    if ANALYZE is None:
        return
    checked = subprocess.run([ANALYZE, "verify", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    rated = subprocess.run(
        [ANALYZE, "security", "--offline=true", "--threshold=25", str(path)], capture_output=True, text=True, check=False
    )
    assert rated.returncode == 0, rated.stdout[-400:]


MDWE = """
import ctypes, sys, numpy
assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0
from pathlib import Path
from edgekit.runtime.registry import open_session
session = open_session(Path(sys.argv[1]))
session.run({s.name: numpy.ones([d if isinstance(d, int) else 1 for d in s.shape], s.dtype) for s in session.inputs})
import asyncio, sqlite3, ssl, paho.mqtt.client, tuf.ngclient
ssl.create_default_context()
"""


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_runtimes_bear_memory_that_is_never_both_written_and_executed(tmp_path, suffix):
    """What MemoryDenyWriteExecute=yes asks of them, by the kernel's own switch."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
    try:
        from small_runtime_models import write_onnx_affine, write_tflite_add
    finally:
        sys.path.pop(0)
    if ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0:
        pytest.skip("this kernel has no PR_SET_MDWE (Linux 6.3)")
    model = (write_onnx_affine if suffix == "onnx" else write_tflite_add)(tmp_path / f"model.{suffix}")
    done = subprocess.run([sys.executable, "-c", MDWE, str(model)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
