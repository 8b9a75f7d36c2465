"""The agent's configuration: flags over ``EDGEKIT_AGENT_*`` over one TOML file over defaults.

    # /etc/edgekit/agent.toml
    device = "cam-7"
    site = "plant-2"
    model = "kws"
    repository = "https://updates.example.com"
    root = "/etc/edgekit/root.json"
    broker = "mqtts://broker.example.com"

Off loopback the repository must be https and the broker mqtts, and nothing is served, unless ``allow_insecure`` says
otherwise.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import socket
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from edgekit.errors import UsageError
from edgekit.loopback import is_loopback
from edgekit.telemetry.topics import check_name

ENV_PREFIX = "EDGEKIT_AGENT_"
ENV_FILE = "EDGEKIT_AGENT_CONFIG"
MIN_OUTBOX_BYTES = 16 << 10
MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that the agent can be told. Times in seconds, sizes in bytes.

    An empty ``broker`` means no telemetry; an empty ``repository`` means no updates. ``age_identity`` is the file with the keys
    that open sealed releases, mode 0600. On a ``metered`` link models larger than ``metered_limit_bytes`` are fetched as deltas
    only, unless ``metered_full`` allows the whole.
    """

    device: str = ""
    site: str = "default"
    state_dir: str = ""
    model: str = ""
    channel: str = "production"
    repository: str = ""
    root: str = ""
    poll_s: float = 60.0
    host: str = "127.0.0.1"
    port: int = 8080
    broker: str = ""
    broker_username: str = ""
    broker_password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    age_identity: str = ""
    window_s: float = 60.0
    heartbeat_s: float = 30.0
    threads: int = 1
    max_request_bytes: int = 16 << 20
    request_timeout_s: float = 30.0
    drain_s: float = 5.0
    selftest_timeout_s: float = 120.0
    outbox_bytes: int = 32 << 20
    disk_reserve_bytes: int = 16 << 20
    metered: bool = False
    metered_full: bool = False
    metered_limit_bytes: int = 1 << 20
    labels: dict[str, str] = {}
    allow_insecure: bool = False

    @property
    def state_path(self) -> Path:
        """The state folder."""
        return Path(self.state_dir)


def default_device() -> str:
    """A stable name of this machine: host name and eight digits of a hash of its machine id."""
    host = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")[:40] or "device"
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        try:
            machine = path.read_text().strip()
        except OSError:
            continue
        if machine:
            return f"{host}-{hashlib.sha256(b'edgekit:' + machine.encode()).hexdigest()[:8]}"
    return host


def default_state_dir() -> str:
    """``/var/lib/edgekit`` for root, a folder in the user's state directory for everybody else."""
    if os.geteuid() == 0:
        return "/var/lib/edgekit"
    return str(Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "edgekit")


def _hint(name: str) -> str:
    known = AgentConfig.__struct_fields__
    near = difflib.get_close_matches(name, known, 1)
    return f'Did you mean "{near[0]}"?' if near else f"Known: {', '.join(known)}."


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "config.unreadable", f"{path}: cannot be read: {error}.", hint="Check the --config argument."
        ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError("config.malformed", f"{path}: not valid TOML: {error}.") from error


def _environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, text in environ.items():
        if not key.startswith(ENV_PREFIX) or key == ENV_FILE:
            continue
        name = key.removeprefix(ENV_PREFIX).lower()
        if name not in AgentConfig.__struct_fields__:
            raise UsageError("config.unknown_key", f"{key}: no such setting.", hint=_hint(name))
        values[name] = _parse_labels(text) if name == "labels" else text
    return values


def _parse_labels(text: str) -> dict[str, str]:
    labels = {}
    for pair in filter(None, text.split(",")):
        name, separator, value = pair.partition("=")
        if not separator:
            raise UsageError("config.invalid", f"label {pair!r}: expected name=value.")
        labels[name.strip()] = value.strip()
    return labels


def load_config(
    path: Path | None = None, *, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> AgentConfig:
    """Read and check the configuration.

    Args:
        path: a TOML file; None reads the one that ``EDGEKIT_AGENT_CONFIG`` names, if any.
        flags: settings from the command line; None values are not set.
        environ: environment variables; the process's own when None.

    Raises:
        UsageError: ``config.unreadable``, ``config.malformed``, ``config.unknown_key``, ``config.invalid`` or
            ``config.insecure``.
    """
    environ = os.environ if environ is None else environ
    file = path or (Path(environ[ENV_FILE]) if environ.get(ENV_FILE) else None)
    values: dict[str, Any] = _read_file(file) if file else {}
    for name in values:
        if name not in AgentConfig.__struct_fields__:
            raise UsageError("config.unknown_key", f"{file}: {name}: no such setting.", hint=_hint(name))
    values |= _environment(environ)
    values |= {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        config = msgspec.convert(values, AgentConfig, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError("config.invalid", f"{file or 'settings'}: {error}.") from error
    config = msgspec.structs.replace(
        config, device=config.device or default_device(), state_dir=config.state_dir or default_state_dir()
    )
    check_config(config)
    return config


def _invalid(message: str, hint: str = "") -> UsageError:
    return UsageError("config.invalid", message, hint=hint)


def check_config(config: AgentConfig) -> None:
    """Refuse what cannot work or is not safe.

    Raises:
        UsageError: ``config.invalid``, ``config.insecure`` or ``telemetry.name``.
    """
    check_name(config.device, "device")
    check_name(config.site, "site")
    for field in ("poll_s", "window_s", "heartbeat_s", "request_timeout_s", "selftest_timeout_s"):
        if not 0 < getattr(config, field) < 1e7:
            raise _invalid(f"{field} is {getattr(config, field):g}: expected a positive number of seconds.")
    if config.outbox_bytes < MIN_OUTBOX_BYTES:
        raise _invalid(f"outbox_bytes is {config.outbox_bytes}: expected at least {MIN_OUTBOX_BYTES}.")
    if not 0 <= config.port <= 65535:
        raise _invalid(f"port is {config.port}: expected 0..65535 (0: any free port).")
    for field, least in (
        ("threads", 1),
        ("max_request_bytes", 1),
        ("drain_s", 0),
        ("disk_reserve_bytes", 0),
        ("metered_limit_bytes", 0),
    ):
        if not least <= getattr(config, field) < 1 << 40:
            raise _invalid(f"{field} is {getattr(config, field):g}: expected at least {least}.")
    if not is_loopback(config.host) and not config.allow_insecure:
        raise UsageError(
            "config.insecure",
            f"host {config.host}: plain http, without any log-in, to other machines.",
            hint="Serve on 127.0.0.1, or set allow_insecure = true if this network is yours.",
        )
    if config.repository:
        _check_repository(config)
    if config.broker:
        parse_broker(config)
    if config.age_identity:
        _check_identity(Path(config.age_identity))


def _check_identity(path: Path) -> None:
    """The file must be there and private; whether it holds keys is seen when something is to be opened."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise _invalid(f"age_identity {path}: no such file.", 'Make one: "edgekit bundle keygen --scheme age".') from None
    except OSError:
        return  # another user asks, who may not look there
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(
            "config.insecure",
            f"age_identity {path}: mode {stat.S_IMODE(mode):04o}, others can use it; expected 0600.",
            hint=f"chmod 600 {path}; if others did read it, make a new one.",
        )


def _split(url: str, name: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # refuses what is not a port
    except ValueError as error:
        raise _invalid(f"{name} {url!r}: {error}.") from error
    return parts


def _check_repository(config: AgentConfig) -> None:
    url = _split(config.repository, "repository")
    if url.username or url.password:
        raise _invalid("repository: the URL holds a user name.", "Use cert_file and key_file to authenticate.")
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise _invalid(f"repository {config.repository!r}: expected an http or https URL.")
    if not config.model:
        raise _invalid("model is not set.", "Name the model that this device runs: --model NAME.")
    if not config.root:
        raise _invalid("root is not set.", "Give the repository's first root metadata file (1.root.json): --root FILE.")
    if url.scheme == "http" and not is_loopback(url.hostname) and not config.allow_insecure:
        raise UsageError(
            "config.insecure",
            f"repository {config.repository}: plain http to another machine.",
            hint="Use https, or set allow_insecure = true if this network is yours.",
        )


class Broker(msgspec.Struct, frozen=True, kw_only=True):
    """Where the broker is."""

    host: str
    port: int
    is_tls: bool


def parse_broker(config: AgentConfig) -> Broker:
    """Take the broker's URL apart.

    Raises:
        UsageError: ``config.invalid`` or ``config.insecure``.
    """
    url = _split(config.broker, "broker")
    if url.scheme not in MQTT_PORTS or not url.hostname or url.path not in {"", "/"}:
        raise _invalid(f"broker {config.broker!r}: expected mqtt://host[:port] or mqtts://host[:port].")
    if url.username or url.password:
        raise _invalid("broker: the URL holds a user name.", "Set broker_username and broker_password_file instead.")
    if url.scheme == "mqtt" and not is_loopback(url.hostname) and not config.allow_insecure:
        raise UsageError(
            "config.insecure",
            f"broker {config.broker}: plain mqtt to another machine.",
            hint="Use mqtts://, or set allow_insecure = true if this network is yours.",
        )
    return Broker(host=url.hostname, port=url.port or MQTT_PORTS[url.scheme], is_tls=url.scheme == "mqtts")
