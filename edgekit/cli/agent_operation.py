"""``edgekit agent``: what an operator does with it, at the device. Registered by :mod:`edgekit.cli.agent`."""

from __future__ import annotations

import http.client
import json as jsonlib
import secrets
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from edgekit.cli.console import note, out, out_json, paint
from edgekit.errors import DeviceError, EdgekitError, EnvironmentFault, TrustError, UsageError

if TYPE_CHECKING:
    from edgekit.agent.config import AgentConfig
    from edgekit.agent.inbox import Request
    from edgekit.schema.state import AgentStatus

STATUS_SECONDS = 5.0
TRUST_CODES = ("trust.", "bundle.", "release.", "install.untrusted", "install.older")
_SYMBOLS = {"ok": "✓", "note": "·", "fault": "✗"}
_UNITS = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

STATE_DIR = typer.Option(None, "--state-dir", help="The agent's state folder.")
CONFIG = typer.Option(None, "--config", metavar="FILE", help="The agent's settings.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (install, rollback, pause, resume, logs, doctor, debug, service):
        app.command()(command)


def settings_of(config: Path | None, state_dir: Path | None) -> AgentConfig:
    """The agent's settings, as it reads them."""
    from edgekit.agent.config import load_config

    return load_config(config, flags={"state_dir": str(state_dir.absolute())} if state_dir else {})


# --- asking a running agent


def ask_status(url: str) -> AgentStatus | None:
    """A running agent's own view; None when nobody answers there."""
    from edgekit.schema.base import decode_json
    from edgekit.schema.state import AgentStatus

    try:
        address = f"{url.rstrip('/')}/status"
        with urllib.request.urlopen(address, timeout=STATUS_SECONDS) as answer:  # noqa: S310 - http, by the callers
            return decode_json(answer.read(), AgentStatus, name=f"{url}/status")
    except (OSError, urllib.error.URLError, http.client.HTTPException):
        return None


def status_of(state_dir: Path) -> AgentStatus | None:
    """The view of the agent of a state folder, and of no other: another one may listen on its port by now."""
    try:
        run = jsonlib.loads((state_dir / "agent.json").read_text())
        url, pid, instance = str(run["url"]), int(run["pid"]), str(run.get("instance", ""))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    answer = ask_status(url)
    if answer is None or answer.pid != pid or (instance and answer.instance != instance):
        return None
    return answer


def request(folder: Path, asked: Request, *, timeout_s: float, bundle: Path | None = None) -> str:
    """Ask the agent of a state folder for something; what became of it.

    Raises:
        EnvironmentFault: ``agent.not_running``.
        TrustError, DeviceError, UsageError: what the agent answered.
    """
    from edgekit.agent.checkup import lock_holder
    from edgekit.agent.inbox import Inbox

    try:
        is_running = bool(lock_holder(folder))
    except PermissionError as error:
        hint = "Run this as the agent's user, or as root."
        raise EnvironmentFault("state.unwritable", f"{folder}: {error.strerror}.", hint=hint) from error
    if not is_running:
        hint = 'Start it with "edgekit agent run"; only the running agent installs, tests and switches.'
        raise EnvironmentFault("agent.not_running", f"{folder}: no agent runs with this state folder.", hint=hint)
    answer = Inbox(folder).ask(asked, timeout_s=timeout_s, bundle=bundle)
    if not answer.code:
        return answer.text
    kind: type[EdgekitError] = DeviceError
    if answer.code.startswith(TRUST_CODES):
        kind = TrustError
    elif answer.code in {"model.unknown", "pause.length"}:
        kind = UsageError
    raise kind(answer.code, answer.text)


def parse_duration(text: str, option: str) -> float:
    """Seconds of ``90``, ``30min``, ``8h`` or ``2d``.

    >>> parse_duration("8h", "--for")
    28800.0
    """
    unit = text.lstrip("0123456789.")
    number = text[: len(text) - len(unit)]
    try:
        seconds = float(number) * _UNITS[unit.strip() or "s"]
    except (ValueError, KeyError):
        raise UsageError("config.invalid", f"{option} {text}: expected a time such as 30min, 8h or 2d.") from None
    return seconds


# --- the commands


def install(
    source: Path = typer.Argument(..., metavar="STICK|FILE", help='Folder of "edgekit repo stick", or a signed .edgekit file.'),
    state_dir: Path | None = STATE_DIR,
    config: Path | None = CONFIG,
    timeout_s: float = typer.Option(300.0, "--timeout", min=1, metavar="SECONDS", help="How long to wait."),
) -> None:
    """Let the running agent install from a stick or from a bundle, without a network. Exit 4: it was refused.

    A stick carries signed metadata and is checked as the repository is. A bundle alone carries none: it is taken when metadata
    that the agent has seen lists it, or when it is signed by a key of the setting publisher_keys and is not older than what was
    installed before; whoever can write the agent's state folder vouches for the rest.
    """
    from edgekit.agent.inbox import Request

    folder = settings_of(config, state_dir).state_path
    if source.is_file():
        asked = Request(id=secrets.token_hex(8), kind="install_file", name=source.name)
        out(request(folder, asked, timeout_s=timeout_s, bundle=source))
        return
    if not (source / "metadata").is_dir():
        hint = 'Give a .edgekit file, or make a stick: "edgekit repo stick DIR NAME@VERSION --out STICK".'
        raise UsageError("stick.not_found", f"{source}: no bundle, and no stick's folder (it has no metadata).", hint=hint)
    asked = Request(id=secrets.token_hex(8), kind="install", stick=str(source.absolute()))
    out(request(folder, asked, timeout_s=timeout_s))


def rollback(
    model: str = typer.Argument("", metavar="[MODEL]", help="Of several models, which.", show_default="the first"),
    is_allowed_again: bool = typer.Option(
        False, "--allow-again", help="Roll nothing back: let come again what was rolled back before."
    ),
    state_dir: Path | None = STATE_DIR,
    config: Path | None = CONFIG,
    timeout_s: float = typer.Option(120.0, "--timeout", min=1, metavar="SECONDS", help="How long to wait."),
) -> None:
    """Go back to the model in the other slot. The release that is left is refused from then on, until --allow-again."""
    from edgekit.agent.inbox import Request

    kind: Literal["allow_again", "rollback"] = "allow_again" if is_allowed_again else "rollback"
    asked = Request(id=secrets.token_hex(8), kind=kind, model=model)
    out(request(settings_of(config, state_dir).state_path, asked, timeout_s=timeout_s))


def pause(
    length: str = typer.Option("1d", "--for", metavar="TIME", help="How long: 90, 30min, 8h, 2d."),
    state_dir: Path | None = STATE_DIR,
    config: Path | None = CONFIG,
) -> None:
    """Let updates wait; what is installed goes on serving, and recalls hold. It ends by itself."""
    from edgekit.agent.inbox import Request

    asked = Request(id=secrets.token_hex(8), kind="pause", seconds=parse_duration(length, "--for"))
    out(request(settings_of(config, state_dir).state_path, asked, timeout_s=30.0))


def resume(state_dir: Path | None = STATE_DIR, config: Path | None = CONFIG) -> None:
    """End a pause of the updates."""
    from edgekit.agent.inbox import Request

    asked = Request(id=secrets.token_hex(8), kind="resume")
    out(request(settings_of(config, state_dir).state_path, asked, timeout_s=30.0))


def logs(
    is_followed: bool = typer.Option(False, "-f", "--follow", help="Go on with what comes, until Ctrl-C."),
    count: int = typer.Option(50, "-n", "--lines", min=0, help="How many of the last lines."),
    is_events: bool = typer.Option(False, "--events", help="Only what the fleet is told: installs, rollbacks, commands, ..."),
    state_dir: Path | None = STATE_DIR,
    config: Path | None = CONFIG,
) -> None:
    """Show the agent's own log, of its state folder: one line an event, key=value."""
    from edgekit.agent import logs as log

    folder = settings_of(config, state_dir).state_path
    if not (folder / log.LOG_FILE).exists() and not is_followed:
        hint = "Give the agent's --state-dir or --config; with log_bytes = 0 it keeps no log: see journalctl."
        raise EnvironmentFault("agent.no_log", f"{folder}: no {log.LOG_FILE} there.", hint=hint)
    wanted = "logger=edgekit.agent.journal " if is_events else ""
    lines = last_lines = log.last_lines(folder, count if not wanted else 1_000_000)
    if wanted:
        lines = [line for line in last_lines if wanted in line][-count:] if count else []
    for line in lines:
        out(line)
    if is_followed:
        try:
            for line in log.follow(folder):
                if wanted in line:
                    out(line)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def doctor(
    is_offline: bool = typer.Option(False, "--offline", help="Do not try the repository and the broker."),
    state_dir: Path | None = STATE_DIR,
    config: Path | None = CONFIG,
    json: bool = typer.Option(False, "--json", help="Print the checks as JSON."),
) -> None:
    """Check this device's agent: state, slots, trust, clock, network, certificates, memory, service. Exit 1 on a fault."""
    from edgekit.agent.checkup import check_agent

    settings = settings_of(config, state_dir)
    checkup = check_agent(settings, status_of(settings.state_path), is_network_tried=not is_offline)
    if json:
        out_json(checkup)
        raise typer.Exit(0 if checkup.is_healthy else 1)
    width = max(len(check.area) for check in checkup.checks)
    colors: dict[str, Literal["green", "dim", "red"]] = {"ok": "green", "note": "dim", "fault": "red"}
    for check in checkup.checks:
        out(f"{paint(_SYMBOLS[check.level], colors[check.level])} {check.area.ljust(width)}  {check.message}")
        if check.hint and check.level != "ok":
            out(f"  {' ' * width}  → {check.hint}")
    faults = sum(check.level == "fault" for check in checkup.checks)
    note(f"{faults} fault{'s' if faults != 1 else ''}" if faults else "no faults", "red" if faults else "green")
    raise typer.Exit(0 if checkup.is_healthy else 1)


def debug(
    file: Path = typer.Option(..., "--out", metavar="FILE", help="Where to write it, for example debug.tar.gz."),
    state_dir: Path | None = STATE_DIR,
    config: Path | None = CONFIG,
) -> None:
    """Collect what somebody needs to see what is wrong here: status, states, checks, log. No model, no data, no secret."""
    from edgekit.agent.debug_bundle import make_bundle
    from edgekit.durable import write_durably
    from edgekit.schema.base import encode_json

    settings = settings_of(config, state_dir)
    answer = status_of(settings.state_path)
    data = make_bundle(settings, encode_json(answer) if answer else b"")
    try:
        write_durably(file, data, mode=0o600)
    except OSError as error:
        raise EnvironmentFault("output.unwritable", f"{file}: cannot be written: {error.strerror}.") from error
    note(f"wrote {file}, {len(data)} bytes: look through it before you pass it on")


def service(
    user: str = typer.Option("", "--user", metavar="NAME", help="Who runs it.", show_default="a user made for the service"),
    is_printed: bool = typer.Option(False, "--print", help="Print the unit and install nothing."),
    config: Path = typer.Option(Path("/etc/edgekit/agent.toml"), "--config", metavar="FILE", help="The agent's settings."),
    folder: Path = typer.Option(Path("/etc/systemd/system"), "--unit-dir", hidden=True),
) -> None:
    """Write a systemd service for the agent: watched, restarted, and shut off from everything that it does not need."""
    from edgekit.agent.config import load_config
    from edgekit.agent.service import SYSTEM_STATE, UNIT_NAME, make_unit
    from edgekit.durable import write_durably

    config = config.absolute()
    settings = load_config(config, environ={"EDGEKIT_AGENT_STATE_DIR": _state_dir_of(config) or str(SYSTEM_STATE)})
    unit = make_unit(settings, command=(sys.executable, "-P", "-m", "edgekit"), file=config, user=user)
    if is_printed:
        sys.stdout.write(unit)
        return
    path = folder / UNIT_NAME
    try:
        write_durably(path, unit.encode())
    except OSError as error:
        hint = "Run this as root, or look at the unit with --print."
        raise EnvironmentFault("output.unwritable", f"{path}: cannot be written: {error.strerror}.", hint=hint) from error
    note(f"wrote {path}")
    note(f"start it: systemctl daemon-reload && systemctl enable --now {UNIT_NAME}")


def _state_dir_of(config: Path) -> str:
    """The state folder that the file names; empty when it leaves that open."""
    import tomllib

    try:
        return str(tomllib.loads(config.read_text(encoding="utf-8")).get("state_dir", ""))
    except (OSError, ValueError):
        return ""  # reading the settings says what is wrong
