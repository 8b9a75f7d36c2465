"""Everything that an operator would look at on a device, in one go. It only reads, beside a running agent and without one.

Each check says what it saw, and what to do where something is wrong. ``fault``: the agent cannot do its work, or soon will not.
``note``: worth knowing.

    >>> check_agent(config).is_healthy  # doctest: +SKIP
    True
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from edgekit.agent.audit import AuditLog
from edgekit.agent.config import AgentConfig
from edgekit.agent.errands import read_state, state_dirs
from edgekit.agent.logs import LOG_FILE
from edgekit.agent.slots import SlotStore
from edgekit.agent.vitals import MEGA, disk_free_bytes, rss_bytes
from edgekit.bundle.opening import content_of, opened_variant
from edgekit.errors import EdgekitError
from edgekit.schema.base import Record, decode_json
from edgekit.schema.command import OperationState
from edgekit.schema.state import AgentState, AgentStatus, Slot

Level = Literal["ok", "note", "fault"]
SOON = timedelta(days=14)
SPOOL_NOTE, SPOOL_FAULT = 0.5, 0.9
MEMORY_NOTE = 0.9
_TIME_ERROR = 5
_TIMEX_BYTES = 512
_FIRST_YEAR = 2025


class Check(Record, frozen=True, kw_only=True):
    """One thing that was looked at."""

    area: str
    level: Level
    message: str
    hint: str = ""


class Checkup(Record, frozen=True, kw_only=True):
    """The whole answer of ``edgekit agent doctor --json``."""

    device: str
    at: datetime
    checks: tuple[Check, ...]
    is_healthy: bool


def ok(area: str, message: str) -> Check:
    """All is well."""
    return Check(area=area, level="ok", message=message)


def note(area: str, message: str, hint: str = "") -> Check:
    """Worth knowing."""
    return Check(area=area, level="note", message=message, hint=hint)


def fault(area: str, message: str, hint: str = "") -> Check:
    """Something is wrong."""
    return Check(area=area, level="fault", message=message, hint=hint)


def check_agent(config: AgentConfig, status: AgentStatus | None = None, *, is_network_tried: bool = True) -> Checkup:
    """Look at everything.

    Args:
        config: the agent's settings.
        status: what the running agent says of itself; None when it does not run.
        is_network_tried: connect to the repository and to the broker.
    """
    from edgekit.agent.checkup_network import check_network, check_tls_files  # noqa: PLC0415 - ssl, urllib3

    looks: list[Callable[[], Iterator[Check]]] = [
        lambda: _check_state_folder(config),
        lambda: _check_disk(config),
        lambda: _check_process(config, status),
        lambda: _check_models(config),
        lambda: _check_trust(config),
        lambda: check_tls_files(config),
        lambda: _check_clock(config),
        lambda: check_network(config, status) if is_network_tried else iter(()),
        lambda: _check_spool(config, status),
        lambda: _check_files(config),
        lambda: _check_system(config),
    ]
    checks = tuple(check for look in looks for check in _safely(look))
    is_healthy = all(check.level != "fault" for check in checks)
    return Checkup(device=config.device, at=datetime.now(UTC), checks=checks, is_healthy=is_healthy)


def _safely(look: Callable[[], Iterator[Check]]) -> list[Check]:
    """What one look found; what it may not see is no reason to end."""
    found: list[Check] = []
    try:
        for check in look():
            found.append(check)  # noqa: PERF402 - what was found before an error is kept
    except OSError as error:
        found.append(note("access", f"{error.filename or ''}: {error.strerror}", "run this as the agent's user, or as root"))
    return found


# --- the state folder and the disk


def _check_state_folder(config: AgentConfig) -> Iterator[Check]:
    path = config.state_path
    try:
        seen = path.stat()
    except FileNotFoundError:
        yield fault("state", f"{path} is not there", "start the agent, or give its --state-dir or --config")
        return
    mode = stat.S_IMODE(seen.st_mode)
    if mode & 0o077:
        yield fault("state", f"{path} has mode {mode:04o}: others can command the agent", f"chmod 700 {path}")
    else:
        yield ok("state", f"{path}, mode {mode:04o}, owner {seen.st_uid}")
    for name in ("state.json", "operation.json", "outbox.db", "audit.log", LOG_FILE):
        file = path / name
        if file.exists() and (found := stat.S_IMODE(file.stat().st_mode)) & 0o077:
            yield note("state", f"{file} has mode {found:04o}, expected 0600", f"chmod 600 {file}")


def _check_disk(config: AgentConfig) -> Iterator[Check]:
    if not config.state_path.is_dir():
        return
    free = disk_free_bytes(config.state_path)
    largest = max((_size(folder / "slots" / name) for folder in state_dirs(config).values() for name in "ab"), default=0)
    needed = config.disk_reserve_bytes + largest
    text = f"{free / MEGA:.0f} MB free at {config.state_path}"
    if free < config.disk_reserve_bytes:
        yield fault("disk", text, f"free at least {needed / MEGA:.0f} MB: the next update needs them")
    elif free < needed:
        yield note("disk", f"{text}; an update as large as the largest slot needs {needed / MEGA:.0f} MB", "free some")
    else:
        yield ok("disk", text)
    seen = os.statvfs(config.state_path)
    if seen.f_files and seen.f_favail < 100:
        yield fault("disk", f"{seen.f_favail} file names are left", "remove small files")
    if seen.f_flag & os.ST_RDONLY:
        yield fault("disk", "the file system is read-only", "see dmesg: flash that fails does that")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


# --- the processes


def lock_holder(state_dir: Path) -> int:
    """The process that runs the agent on a state folder; 0 when none does."""
    try:
        descriptor = os.open(state_dir / "agent.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.read(descriptor, 32).decode(errors="replace").strip() or 0)
    else:
        return 0
    finally:
        os.close(descriptor)


def _check_process(config: AgentConfig, status: AgentStatus | None) -> Iterator[Check]:
    pid = lock_holder(config.state_path)
    if not pid:
        yield fault("agent", "it does not run", 'start it: "edgekit agent run", or systemctl start edgekit-agent')
        yield from _check_port_free(config)
        return
    if status is None:
        yield fault("agent", f"process {pid} holds the lock and does not answer", 'see "edgekit agent logs"')
        return
    yield ok("agent", f"process {pid} runs since {status.started_at:%Y-%m-%d %H:%M} UTC and answers at {status.url}")
    yield from _check_memory(config, pid)
    yield from _check_hardening(pid)


def _check_port_free(config: AgentConfig) -> Iterator[Check]:
    import socket  # noqa: PLC0415 - where no agent runs

    if not config.port:
        return
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            yield fault(
                "port", f"{config.host}:{config.port}: {error.strerror}", "stop what listens there, or give another port"
            )
        else:
            yield ok("port", f"{config.host}:{config.port} is free")


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _check_memory(config: AgentConfig, pid: int) -> Iterator[Check]:
    own, workers = rss_bytes(pid) / MEGA, [rss_bytes(child) / MEGA for child in _children(pid)]
    total, limit = own + sum(workers), config.resources.memory_max_mb
    text = f"supervisor {own:.0f} MB, {' + '.join(f'{each:.0f}' for each in workers) or 'no'} MB in workers"
    if limit and total > MEMORY_NOTE * limit:
        yield fault("memory", f"{text}, of {limit:g} MB that are allowed", "raise [resources] memory_max_mb")
    else:
        yield ok("memory", text)


def _check_hardening(pid: int) -> Iterator[Check]:
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    missing = [
        what
        for what, is_there in (
            ("NoNewPrivileges", fields.get("NoNewPrivs") == "1"),
            ("SystemCallFilter", fields.get("Seccomp") == "2"),
            ("an empty CapabilityBoundingSet", int(fields.get("CapBnd", "0"), 16) == 0),
            ("a user of its own", fields.get("Uid", "0").split()[0] != "0"),
        )
        if not is_there
    ]
    unit = next((part for part in Path(f"/proc/{pid}/cgroup").read_text().split("/") if part.strip().endswith(".service")), "")
    if not unit:
        yield note("service", "no systemd service: nobody starts it again", 'write one: "edgekit agent service"')
    elif missing:
        yield note("service", f"{unit.strip()} runs without {', '.join(missing)}", 'write it anew: "edgekit agent service"')
    else:
        yield ok("service", f"{unit.strip()}, hardened")


# --- the models


def _check_models(config: AgentConfig) -> Iterator[Check]:
    for name, folder in state_dirs(config).items():
        state = read_state(folder)
        if state is None:
            if (folder / "state.json").exists():
                yield fault(
                    "model", f"{folder / 'state.json'} cannot be read", "the agent rebuilds it from the slots at its start"
                )
            elif name:
                yield note("model", f"{name}: nothing was installed yet")
            continue
        yield from _check_model(name, folder, state)


def _check_model(name: str, folder: Path, state: AgentState) -> Iterator[Check]:
    for slot in state.slots:
        if slot.status in {"active", "good"}:
            yield _check_slot(folder, slot)
    if state.active is None and name:
        yield fault("model", f"{name}: no slot serves", 'see "edgekit agent status" and "edgekit agent logs"')
    if state.probation is not None:
        yield note(
            "model", f"{name}: slot {state.probation.slot} is on probation, {state.probation.inferences} inferences so far"
        )
    if state.phase != "idle":
        yield note("model", f"{name}: {state.phase} {state.intent}")
    for refusal in state.refusals[-3:]:
        yield note("model", f"{refusal.model}@{refusal.version} is refused: {refusal.code}: {refusal.reason}")
    floors = state.floors
    releases = ", ".join(f"{model} {counter}" for model, counter in sorted(floors.releases.items())) or "none"
    yield ok(
        "floors", f"releases {releases}; root {floors.root}, timestamp {floors.timestamp}, targets {floors.targets}; "
        f"time {floors.time.isoformat(timespec='minutes') if floors.time else 'none'}"
    )  # fmt: skip


def _check_slot(folder: Path, slot: Slot) -> Check:
    label = f"slot {slot.name}: {slot.model}@{slot.version} ({slot.status})"
    store = SlotStore(folder)
    try:
        manifest = store.read_manifest(slot)
        variant = next(each for each in manifest.variants if opened_variant(manifest, each).model == slot.model_digest)
        refs = [ref for ref in manifest.blobs if ref.digest in {variant.model, variant.golden}]
        store.verify(slot.name, refs)
    except StopIteration:
        return fault("model", f"{label}: its manifest has no such variant", "the agent fetches it again")
    except EdgekitError as error:
        return fault("model", f"{label}: {error.message}", error.hint)
    size = sum(content_of(ref).size_bytes for ref in refs)
    return ok("model", f"{label}: {size / MEGA:.1f} MB, every hash is right")


# --- trust and time


def expiry_of(path: Path) -> datetime | None:
    """When a metadata file expires, as it says itself."""
    try:
        return datetime.fromisoformat(json.loads(path.read_bytes())["signed"]["expires"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def judge_expiry(area: str, what: str, expires_at: datetime, *, hint: str) -> Check:
    """A date that comes."""
    left = expires_at - datetime.now(UTC)
    text = f"{what} expires {expires_at:%Y-%m-%d %H:%M} UTC"
    if left <= timedelta(0):
        return fault(area, text.replace("expires", "expired"), hint)
    if left < SOON:
        return note(area, f"{text}, in {left.days} days", hint)
    return ok(area, text)


def _check_trust(config: AgentConfig) -> Iterator[Check]:
    if not config.repository:
        yield note("repository", "none is set: nothing will be installed by itself")
        return
    caches = sorted(path for path in (config.state_path / "cache").rglob("*.json") if path.name.count(".") == 1)
    seen: dict[str, datetime] = {}
    for path in caches:
        role = path.stem.split("%")[0]
        if role in {"root", "timestamp", "snapshot", "targets"} and (expires := expiry_of(path)) is not None:
            seen[role] = max(expires, seen.get(role, expires))
    for role, expires in seen.items():
        hint = "the owner of the repository must sign it again; what serves goes on serving"
        if role == "timestamp" and expires <= datetime.now(UTC):
            yield note("trust", f"the last timestamp that was seen expired {expires:%Y-%m-%d %H:%M} UTC", hint)
        else:
            yield (
                judge_expiry("trust", role, expires, hint=hint)
                if role != "timestamp"
                else ok("trust", f"timestamp expires {expires:%Y-%m-%d %H:%M} UTC")
            )
    if not seen:
        yield note("trust", "no metadata was fetched yet")


def is_clock_synchronized() -> bool | None:
    """What the kernel says (adjtimex(2)); None where it cannot be asked."""
    try:
        code = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if code < 0 else code != _TIME_ERROR


def _check_clock(config: AgentConfig) -> Iterator[Check]:
    now, state = datetime.now(UTC), read_state(config.state_path)
    floor = state.floors.time if state else None
    text = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now.year < _FIRST_YEAR or (floor is not None and now < floor - timedelta(minutes=5)):
        yield fault("clock", f"it says {text}, which is past: this device has seen {floor or _FIRST_YEAR}", "set the clock")
        return
    synchronized = is_clock_synchronized()
    if synchronized is False:
        yield note(
            "clock", f"{text}; the kernel says that it is not synchronized", "run an NTP client, for example systemd-timesyncd"
        )
    else:
        yield ok("clock", text + ("" if synchronized is None else ", synchronized"))


# --- spool, files, system


def _check_spool(config: AgentConfig, status: AgentStatus | None) -> Iterator[Check]:
    if not config.broker:
        return
    path = config.state_path / "outbox.db"
    used = status.outbox_bytes if status else (path.stat().st_size if path.exists() else 0)
    share = used / config.outbox_bytes
    count = f"{status.outbox_messages} messages, " if status else ""
    text = f"{count}{used / MEGA:.2f} of {config.outbox_bytes / MEGA:.0f} MB"
    if share >= SPOOL_FAULT:
        yield fault("spool", f"{text}: the oldest figures are being dropped", "bring the broker back, or raise outbox_bytes")
    elif share >= SPOOL_NOTE:
        yield note("spool", text, "the broker was away for long")
    else:
        yield ok("spool", text)


def _check_files(config: AgentConfig) -> Iterator[Check]:
    from edgekit.trust.keys import load_public_keys  # noqa: PLC0415 - where keys are looked at

    for name in ("key_file", "age_identity", "broker_password_file"):
        if not (value := getattr(config, name)):
            continue
        path = Path(value)
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except FileNotFoundError:
            yield fault("keys", f"{name} {path} is not there")
            continue
        if mode & 0o077:
            yield fault("keys", f"{name} {path} has mode {mode:04o}: others can use it", f"chmod 600 {path}")
        else:
            yield ok("keys", f"{name} {path}, mode {mode:04o}")
    for name in ("publisher_keys", "fleet_keys", "command_keys", "factory_keys"):
        if not (value := getattr(config, name)):
            continue
        try:
            keys = load_public_keys(Path(value))
        except EdgekitError as error:
            yield fault("keys", f"{name}: {error.message}", error.hint)
            continue
        known = ", ".join(f"{key.keyid[:12]}…" for key in keys)
        yield ok("keys", f"{name}: {known}") if keys else fault("keys", f"{name} {value} holds no key", "put a .pub file there")
    audit = AuditLog(config.state_path)
    lines, is_whole = audit.check()
    if lines and not is_whole:
        yield fault(
            "commands", f"the log of {lines} remote commands was changed", f"compare {audit.path} with the fleet's events"
        )
    elif config.commands or lines:
        yield ok("commands", f"obeys {', '.join(config.commands) or 'none'}; {lines} lines in its log, unbroken")
    try:
        state = decode_json((config.state_path / "operation.json").read_bytes(), OperationState)
    except (OSError, EdgekitError):
        return
    if state.paused_until and state.paused_until > datetime.now(UTC):
        yield note("updates", f"paused until {state.paused_until:%Y-%m-%d %H:%M} UTC", '"edgekit agent resume"')


def _check_system(config: AgentConfig) -> Iterator[Check]:
    from edgekit.runtime.registry import installed_runtimes  # noqa: PLC0415 - numpy

    runtimes = installed_runtimes()
    if runtimes:
        yield ok("runtime", ", ".join(f"{name} {version}" for name, version in runtimes.items()))
    else:
        yield fault("runtime", "no model runtime is installed", "pip install 'edgekit[agent]'")
    watchdogs = sorted(Path("/sys/class/watchdog").glob("watchdog*"))
    states = {path.name: (path / "state").read_text().strip() for path in watchdogs if (path / "state").is_file()}
    if "active" in states.values():
        yield ok("watchdog", f"{next(name for name, state in states.items() if state == 'active')} is armed")
    elif watchdogs:
        hint = "set RuntimeWatchdogSec= in /etc/systemd/system.conf: a kernel that hangs is reset then"
        yield note("watchdog", f"{watchdogs[0].name} is not armed", hint)
    else:
        yield note("watchdog", "this machine has no hardware watchdog")
    if config.log_bytes and config.state_path.is_dir():
        size = sum(path.stat().st_size for path in config.state_path.glob(f"{LOG_FILE}*"))
        yield ok("log", f"{size / MEGA:.2f} of {config.log_bytes / MEGA:.0f} MB in {config.state_path / LOG_FILE}")
