"""The agent as a systemd service: the unit's text, hardened as far as the agent bears it.

Everything that the agent writes lies in its state folder; it needs no capability, no device, no other user's process and no
memory that is both written and executed (onnxruntime and LiteRT were run under PR_SET_MDWE). Secrets that only root can read
reach a dynamic user as credentials. A worker that the kernel kills for want of memory is the agent's business, not systemd's:
hence ``OOMPolicy=continue``.

    >>> config = AgentConfig(device="cam-7", state_dir="/var/lib/edgekit")
    >>> "NoNewPrivileges=yes" in make_unit(config, command=("/usr/bin/edgekit",))
    True
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from edgekit.agent.config import AgentConfig
from edgekit.errors import UsageError

UNIT_NAME = "edgekit-agent.service"
WATCHDOG_S = 180
RESTART_S = 2
SYSTEM_STATE = Path("/var/lib/edgekit")
_SECRETS = ("key_file", "age_identity", "broker_password_file")
_HOMES = ("/home", "/root", "/run/user")
_HARDENING = (
    "AmbientCapabilities=",
    "CapabilityBoundingSet=",
    "DevicePolicy=closed",
    "KeyringMode=private",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "NoNewPrivileges=yes",
    "PrivateDevices=yes",
    "PrivateTmp=yes",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectProc=invisible",
    "ProtectSystem=strict",
    "RemoveIPC=yes",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "SystemCallArchitectures=native",
    "SystemCallErrorNumber=EPERM",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged",
    "UMask=0077",
)


def _quote(text: str) -> str:
    """One word of a command line, with nothing left for systemd to expand."""
    if any(ord(letter) < 32 for letter in text):
        raise UsageError("service.name", f"{text!r}: a control character cannot stand in a unit.")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if any(letter in text for letter in " \t\"'\\;") else escaped


def _path(path: Path) -> str:
    """A path in a list of paths."""
    return _quote(str(path)).replace("$$", "$")


def _identity(config: AgentConfig, user: str) -> Iterator[str]:
    if user:
        yield f"User={_quote(user)}"
        return
    yield "DynamicUser=yes"
    for name in _SECRETS:
        if path := getattr(config, name):
            yield f"LoadCredential={name}:{_path(Path(path))}"
            yield f"Environment=EDGEKIT_AGENT_{name.upper()}=%d/{name}"


def _state(config: AgentConfig) -> Iterator[str]:
    path = config.state_path
    if path.parent == SYSTEM_STATE.parent:
        yield f"StateDirectory={_path(Path(path.name))}"
        yield "StateDirectoryMode=0700"
    else:
        yield f"ReadWritePaths={_path(path)}"


def _homes(paths: Sequence[Path]) -> str:
    """Homes are out of sight, unless the program or what it reads lies there."""
    is_at_home = any(str(path).startswith(f"{home}/") for path in paths for home in _HOMES)
    return "read-only" if is_at_home else "yes"


def _limits(config: AgentConfig) -> Iterator[str]:
    limits = config.resources
    if limits.memory_max_mb:
        yield f"MemoryMax={round(limits.memory_max_mb * 1e6)}"
        yield "MemorySwapMax=0"
    if limits.cpu_percent:
        yield f"CPUQuota={limits.cpu_percent:g}%"


def make_unit(config: AgentConfig, *, command: Sequence[str], file: Path | None = None, user: str = "") -> str:
    """The unit's text.

    Args:
        config: the agent's settings; its limits and the places of its files decide.
        command: what runs edgekit, absolute.
        file: the settings' file, given to the agent.
        user: who runs it; empty makes one that exists only while the service runs.

    Raises:
        UsageError: ``service.relative`` or ``service.name`` for what cannot stand in a unit.
    """
    read = [Path(value) for name in (*_SECRETS, "root", "ca_file", "cert_file", "factory") if (value := getattr(config, name))]
    for path in (Path(command[0]), config.state_path, *([file] if file else []), *read):
        if not path.is_absolute():
            raise UsageError("service.relative", f"{path}: a service has no working directory.", hint="Give absolute paths.")
    words = [*command, "agent", "run", *(["--config", str(file)] if file else ["--state-dir", config.state_dir])]
    stop_s = round(config.drain_s + config.request_timeout_s) + 20
    lines = [
        "[Unit]",
        f"Description=edgekit agent {config.device}".replace("%", "%%"),
        "Wants=network-online.target",
        "After=network-online.target time-sync.target",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={' '.join(map(_quote, words))}",
        f"WatchdogSec={WATCHDOG_S}",
        "Restart=always",
        f"RestartSec={RESTART_S}",
        f"TimeoutStartSec={round(config.selftest_timeout_s * (1 + len(config.models))) + 60}",
        f"TimeoutStopSec={stop_s}",
        "KillMode=mixed",
        "OOMPolicy=continue",
        "OOMScoreAdjust=-200",
        *_limits(config),
        "",
        *_identity(config, user),
        *_state(config),
        f"ProtectHome={_homes([Path(command[0]), config.state_path, *([file] if file else []), *read])}",
        *_HARDENING,
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"
