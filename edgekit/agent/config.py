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
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import msgspec

from edgekit.agent.identity import IdentityFiles
from edgekit.agent.redaction import parse_rules
from edgekit.errors import UsageError
from edgekit.loopback import is_loopback
from edgekit.schema.command import CommandKind
from edgekit.telemetry.topics import check_name

ENV_PREFIX = "EDGEKIT_AGENT_"
ENV_FILE = "EDGEKIT_AGENT_CONFIG"
MIN_OUTBOX_BYTES = 16 << 10
MIN_LOG_BYTES = 16 << 10
MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the tables in the file."""


class ModelConfig(_Table, frozen=True, kw_only=True):
    """``[models.NAME]``: a further model. ``factory`` as for the first one."""

    channel: str = ""
    """Empty: the first model's."""
    factory: str = ""


class SelfTestConfig(_Table, frozen=True, kw_only=True):
    """``[selftest]``: what a release may take while it proves itself. 0 switches a limit off."""

    ram_factor: float = 2.0
    """Over the memory that the release says it needs."""
    ram_limit_mb: float = 0.0
    latency_factor: float = 5.0
    """Over what was measured on such a device, else over the model that serves."""
    latency_limit_ms: float = 0.0


class ProbationConfig(_Table, frozen=True, kw_only=True):
    """``[probation]``: how a new model proves itself on live traffic; it ends after so many inferences or seconds of serving.

    Both 0: a release counts as committed with its switch.
    """

    inferences: int = 200
    seconds: float = 120.0
    max_crashes: int = 1
    max_starts: int = 3
    """Starts of the agent that no clean stop ended: a device that boots again and again."""
    max_failure_share: float = 0.05
    max_bad_outputs: int = 0
    """Answers with a value that is not finite."""
    max_latency_ratio: float = 5.0
    """p95 against the model before; 0: not compared."""

    @property
    def is_on(self) -> bool:
        """Whether there is a probation."""
        return self.inferences > 0 or self.seconds > 0


class ShadowConfig(_Table, frozen=True, kw_only=True):
    """``[shadow]``: a candidate answers copies of live inputs before it serves. ``samples`` 0: it does not."""

    samples: int = 0
    cpu_percent: float = 20.0
    max_s: float = 600.0
    min_agreement: float = 0.95
    max_latency_ratio: float = 3.0
    tolerance: float = 0.05
    """Relative error below which two answers of a model that is no classifier agree."""
    is_switched_without_traffic: bool = True
    """What becomes of a candidate that saw too few inputs within ``max_s``: it serves (and that is reported), or it waits."""


class SamplesConfig(_Table, frozen=True, kw_only=True):
    """``[samples]``: live inputs that may leave the device, for recalibration. ``per_day`` 0: none ever does."""

    per_day: int = 0
    max_bytes: int = 2_000_000
    """A day."""
    redact: tuple[str, ...] = ()
    """What is taken out first, see ``edgekit.agent.redaction``; it must be said, were it ``none``."""
    k_min: int = 10
    """An input is given only when its answer was given so often before."""


class ResourcesConfig(_Table, frozen=True, kw_only=True):
    """``[resources]``: what the agent may take of the device. 0: no limit.

    ``memory_max_mb`` and ``cpu_percent`` (of one core) hold for the whole service, as "edgekit agent service" writes them.
    """

    memory_max_mb: float = 0.0
    cpu_percent: float = 0.0
    worker_nice: int = 0
    """0..19: how far the model stands back behind other programs."""
    worker_oom_score_adj: int = 300
    """0..1000: short of memory, the kernel ends the worker first; the supervisor starts it again."""


class InferenceTopic(_Table, frozen=True, kw_only=True):
    """``[[inference_topics]]``: messages that are run through a model; see ``edgekit.agent.mqtt_inference``."""

    subscribe: str
    model: str = ""
    """Empty: the agent's first model."""
    publish: str = ""
    format: Literal["v2", "tensor", "rows"] = "v2"
    stream: str = ""
    """With ``rows``: NAME or NAME/SENSOR of the stream."""


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that the agent can be told. Times in seconds, sizes in bytes.

    An empty ``broker`` means no telemetry; an empty ``repository`` means no updates. ``age_identity`` is the file with the keys
    that open sealed releases, mode 0600. On a ``metered`` link models larger than ``metered_limit_bytes`` are fetched as deltas
    only, unless ``metered_full`` allows the whole.

    ``factory`` is a signed bundle that serves when no slot can, ``factory_keys`` a folder with its publishers' keys. With
    ``fleet_keys`` (a folder of public keys) the fleet's signed desired state decides what runs, otherwise the channel does.
    ``minimum_release`` is the lowest release counter of a model that this device ever accepts. ``scrub_s`` is the pause between
    two checks of everything on the disk; 0: none.

    ``drain_per_s`` bounds the messages of the backlog that are sent a second, up to 30 windows each; 0: no bound.

    ``publisher_keys`` is a folder with the keys of those whose bundles "edgekit agent install FILE" takes. ``commands`` are the
    kinds of remote commands that this device obeys, none unless it is told; they are signed by a key of ``command_keys`` (a
    folder; empty: ``fleet_keys``). ``log_bytes`` caps the agent's own log in the state folder; 0: none is kept there.
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
    socket: str = ""
    """Path of a Unix socket that serves the same as host and port; empty for none."""
    socket_mode: int = 0o600
    max_connections: int = 512
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
    drain_per_s: float = 20.0
    disk_reserve_bytes: int = 16 << 20
    metered: bool = False
    metered_full: bool = False
    metered_limit_bytes: int = 1 << 20
    labels: dict[str, str] = {}
    allow_insecure: bool = False
    models: dict[str, ModelConfig] = {}
    selftest: SelfTestConfig = SelfTestConfig()
    probation: ProbationConfig = ProbationConfig()
    shadow: ShadowConfig = ShadowConfig()
    allow_contract_change: bool = False
    factory: str = ""
    factory_keys: str = ""
    fleet_keys: str = ""
    fleet_threshold: int = 1
    minimum_release: dict[str, int] = {}
    scrub_s: float = 7 * 86400.0
    publisher_keys: str = ""
    commands: tuple[CommandKind, ...] = ()
    command_keys: str = ""
    log_bytes: int = 2 << 20
    resources: ResourcesConfig = ResourcesConfig()
    samples: SamplesConfig = SamplesConfig()
    inference_topics: tuple[InferenceTopic, ...] = ()

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
        UsageError: ``config.unreadable``, ``config.malformed``, ``config.unknown_key``, ``config.invalid``, ``config.identity``
            or ``config.insecure``.
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
    config = _with_identity(msgspec.structs.replace(config, state_dir=config.state_dir or default_state_dir()), values)
    config = msgspec.structs.replace(config, device=config.device or default_device())
    check_config(config)
    return config


def _with_identity(config: AgentConfig, given: Mapping[str, Any]) -> AgentConfig:
    """The settings of an enrolled device: its name, its certificate, and what the fleet told it, where nothing else is said."""
    files = IdentityFiles.of(config.state_path)
    about = files.read()
    if about is None:
        return config
    for name in ("site", "device"):
        if given.get(name, getattr(about, name)) != getattr(about, name):
            raise UsageError(
                "config.identity",
                f"{name} is {given[name]!r} in the settings, {getattr(about, name)!r} in this device's certificate.",
                hint=f'Leave it out of the settings, or enrol the device anew ("edgekit agent enroll"); see {files.folder}.',
            )
    changes: dict[str, Any] = {"site": about.site, "device": about.device, "labels": about.labels | config.labels}
    if not config.cert_file:
        changes |= {"cert_file": str(files.pair), "key_file": "", "ca_file": config.ca_file or str(files.authorities)}
    changes["broker"] = config.broker or about.broker
    if config.root:
        changes["repository"] = config.repository or about.repository
    return msgspec.structs.replace(config, **changes)


def _invalid(message: str, hint: str = "") -> UsageError:
    return UsageError("config.invalid", message, hint=hint)


def check_config(config: AgentConfig) -> None:
    """Refuse what cannot work or is not safe.

    Raises:
        UsageError: ``config.invalid``, ``config.insecure`` or ``telemetry.name``.
    """
    check_name(config.device, "device")
    check_name(config.site, "site")
    _check_inference_topics(config)
    for field in ("poll_s", "window_s", "heartbeat_s", "request_timeout_s", "selftest_timeout_s"):
        if not 0 < getattr(config, field) < 1e7:
            raise _invalid(f"{field} is {getattr(config, field):g}: expected a positive number of seconds.")
    if not 0 <= config.drain_per_s < 1e6:
        raise _invalid(f"drain_per_s is {config.drain_per_s:g}: expected 0 or more messages a second.")
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
    _check_updates(config)
    _check_operation(config)


def _check_samples(samples: SamplesConfig) -> None:
    if samples.per_day < 0 or samples.max_bytes < 0 or samples.k_min < 0:
        raise _invalid("[samples] expected 0 or more for per_day, max_bytes and k_min.")
    if samples.per_day and not samples.redact:
        raise _invalid(
            "[samples] per_day is set, redact is not.",
            'Say what is taken out of an input first: redact = ["blur:INPUT:6"], or ["none"].',
        )
    parse_rules(samples.redact)


def _check_operation(config: AgentConfig) -> None:
    _check_samples(config.samples)
    for folder in ("factory_keys", "fleet_keys", "publisher_keys", "command_keys"):
        if (path := getattr(config, folder)) and not Path(path).is_dir():
            raise _invalid(f"{folder} {path}: no such folder.", "It holds the public keys as *.pub.")
    resources = config.resources
    if not (0 <= resources.worker_nice <= 19 and 0 <= resources.worker_oom_score_adj <= 1000):
        raise _invalid("[resources] expected worker_nice of 0..19 and worker_oom_score_adj of 0..1000.")
    if resources.memory_max_mb < 0 or resources.cpu_percent < 0:
        raise _invalid("[resources] memory_max_mb and cpu_percent: expected 0 or more.")
    if config.log_bytes and config.log_bytes < MIN_LOG_BYTES:
        raise _invalid(f"log_bytes is {config.log_bytes}: expected 0, or at least {MIN_LOG_BYTES}.")
    if config.commands and not (config.command_keys or config.fleet_keys):
        raise _invalid("commands is set, command_keys is not.", "Give the folder of the public keys that may command.")


def _check_updates(config: AgentConfig) -> None:
    for name, model in config.models.items():
        if not re.fullmatch(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?", name) or name == config.model:
            raise _invalid(f"[models.{name}]: expected another model's name, of a-z, 0-9, '.', '_' and '-'.")
        if model.factory and not config.factory_keys:
            raise _invalid(f"[models.{name}] factory is set, factory_keys is not.", "Give the folder of its publishers' keys.")
    if config.models and not config.model:
        raise _invalid("[models] is set, model is not.", "Name the first model: model = NAME.")
    _check_tables(config)
    if config.factory and not config.factory_keys:
        raise _invalid("factory is set, factory_keys is not.", "Give the folder of its publishers' keys.")
    if config.fleet_threshold < 1 or config.scrub_s < 0:
        raise _invalid(f"fleet_threshold is {config.fleet_threshold}, scrub_s {config.scrub_s:g}: expected at least 1 and 0.")


def _check_tables(config: AgentConfig) -> None:
    for name in ("selftest", "probation", "shadow"):
        table = getattr(config, name)
        for field in table.__struct_fields__:
            if getattr(table, field) < 0:
                raise _invalid(f"[{name}] {field} is {getattr(table, field)}: expected 0 or more.")
    if config.shadow.samples and not 0 < config.shadow.cpu_percent <= 100:
        raise _invalid(f"[shadow] cpu_percent is {config.shadow.cpu_percent:g}: expected more than 0, at most 100.")


def _check_inference_topics(config: AgentConfig) -> None:
    for topic in config.inference_topics:
        _check_inference_topic(config, topic)


def _check_inference_topic(config: AgentConfig, topic: InferenceTopic) -> None:
    """A filter that MQTT takes, answers that can go somewhere and never come back in, a model that this agent has."""
    levels = topic.subscribe.split("/")
    is_filter = all("#" not in level or (level == "#" and index == len(levels) - 1) for index, level in enumerate(levels))
    if not topic.subscribe or not is_filter or any("+" in level and level != "+" for level in levels):
        raise _invalid(f"inference_topics: subscribe {topic.subscribe!r}: not an MQTT topic filter.")
    if not config.broker:
        raise _invalid("inference_topics: there is no broker.", "Set broker = ...")
    if topic.model and topic.model not in {config.model, *config.models}:
        raise _invalid(f"inference_topics: model {topic.model!r} is none of this agent's.")
    if "+" in topic.publish or "#" in topic.publish:
        raise _invalid(f"inference_topics: publish {topic.publish!r} has a wildcard; {{1}} is what the first one stood for.")
    if topic.publish and re.fullmatch(_as_pattern(topic.subscribe), re.sub(r"\{[0-9]+\}", "x", topic.publish)):
        raise _invalid(f"inference_topics: answers to {topic.publish!r} would come back in by {topic.subscribe!r}.")


def _as_pattern(topic_filter: str) -> str:
    return "/".join({"+": "[^/]*", "#": ".*"}.get(level, re.escape(level)) for level in topic_filter.split("/"))


def _check_identity(path: Path) -> None:
    """The file must be there and private; whether it holds keys is seen when something is to be opened."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise _invalid(f"age_identity {path}: no such file.", 'Make one: "edgekit bundle keygen --scheme age".') from None
    except OSError:
        return  # another user asks, who may not look there
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and not _is_credential(path):
        raise UsageError(
            "config.insecure",
            f"age_identity {path}: mode {stat.S_IMODE(mode):04o}, others can use it; expected 0600.",
            hint=f"chmod 600 {path}; if others did read it, make a new one.",
        )


def _is_credential(path: Path) -> bool:
    """Whether systemd handed the file over: for this service alone, though the mode of an access list looks wider."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    return bool(folder) and path.parent == Path(folder)


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
