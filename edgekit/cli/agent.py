"""``edgekit agent``: run the on-device agent, and ask a running one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgekit.cli import agent_identity, agent_operation
from edgekit.cli.agent_operation import ask_status, settings_of, status_of
from edgekit.cli.console import format_bytes, format_seconds, note, out, out_json, paint, table, warn
from edgekit.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from edgekit.schema.state import AgentState, AgentStatus, ModelStatus

app = typer.Typer(
    help="The on-device agent: run it, ask it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _labels(pairs: list[str] | None) -> dict[str, str] | None:
    if not pairs:
        return None
    labels = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise UsageError("config.invalid", f"--label {pair}: expected NAME=VALUE.")
        labels[name] = value
    return labels


@app.command()
def run(
    config: Path | None = typer.Option(None, "--config", metavar="FILE", help="Settings as TOML; flags win over it."),
    device: str | None = typer.Option(None, "--device", help="This device's name.  [default: from host name and machine id]"),
    site: str | None = typer.Option(None, "--site", help="Where it stands.  [default: default]"),
    state_dir: Path | None = typer.Option(None, "--state-dir", help="Slots, state and spool; private to the agent."),
    repository: str | None = typer.Option(None, "--repository", metavar="URL", help="The update repository."),
    root: Path | None = typer.Option(
        None, "--root", metavar="FILE", help="The repository's first root metadata (1.root.json)."
    ),
    model: str | None = typer.Option(None, "--model", metavar="NAME", help="The model that this device runs."),
    channel: str | None = typer.Option(None, "--channel", help="The channel that it follows.  [default: production]"),
    poll_s: float | None = typer.Option(None, "--poll-s", help="Seconds between two looks at the repository.  [default: 60]"),
    host: str | None = typer.Option(None, "--host", help="Address to serve on.  [default: 127.0.0.1]"),
    port: int | None = typer.Option(None, "--port", help="Port to serve on; 0: any free one.  [default: 8080]"),
    broker: str | None = typer.Option(None, "--broker", metavar="URL", help="mqtt(s)://host[:port]; none: no telemetry."),
    window_s: float | None = typer.Option(None, "--window-s", help="Seconds of one telemetry window.  [default: 60]"),
    threads: int | None = typer.Option(None, "--threads", help="Threads of one inference.  [default: 1]"),
    label: list[str] | None = typer.Option(None, "--label", metavar="NAME=VALUE", help="Label of this device; repeat."),
    age_identity: Path | None = typer.Option(
        None, "--age-identity", metavar="FILE", help="Opens sealed releases: a file with age keys, mode 0600."
    ),
    metered: bool = typer.Option(False, "--metered", help="Bytes cost money: models are fetched as deltas only."),
    allow_insecure: bool = typer.Option(False, "--allow-insecure", help="Allow plain http and mqtt off loopback."),
) -> None:
    """Run the agent in the foreground until SIGTERM or Ctrl-C. It logs key=value on stderr."""
    from edgekit.agent.config import load_config
    from edgekit.cli.agent_process import become_agent

    flags: dict[str, Any] = {
        "device": device,
        "site": site,
        "state_dir": None if state_dir is None else str(state_dir.absolute()),
        "repository": repository,
        "root": None if root is None else str(root.absolute()),
        "model": model,
        "channel": channel,
        "poll_s": poll_s,
        "host": host,
        "port": port,
        "broker": broker,
        "window_s": window_s,
        "threads": threads,
        "labels": _labels(label),
        "age_identity": None if age_identity is None else str(age_identity.absolute()),
        "metered": True if metered else None,
        "allow_insecure": True if allow_insecure else None,
    }
    settings = load_config(config, flags=flags)
    if not settings.repository:
        warn("no --repository: nothing will be installed; only a release that is installed already is served")
    become_agent(settings)


def _slots(state: AgentState) -> str:
    rows = []
    for slot in state.slots:
        release = f"{slot.model}@{slot.version}" if slot.model else "-"
        digest = (slot.model_digest or "").removeprefix("sha256:")[:12]
        counter = str(slot.counter) if slot.counter else "-"
        until = f"{slot.valid_until:%Y-%m-%d}" if slot.valid_until else "-"
        rows.append([slot.name, slot.status, release, counter, slot.variant or "-", digest or "-", until])
    return table(["slot", "status", "release", "counter", "variant", "model", "valid until"], rows, right=[3])


def _show_state(state: AgentState) -> None:
    out(_slots(state))
    for recall in state.recalls:
        out(
            f"{paint('recalled', 'yellow')} {recall.digest[:19]}… from {recall.deadline:%Y-%m-%d %H:%M} UTC on: {recall.reason}"
        )
    for refusal in state.refusals:
        release = f"{refusal.model}@{refusal.version}#{refusal.counter}"
        out(f"{paint('refused', 'yellow')} {release}: {refusal.code}: {refusal.reason}")


def _serves(model: ModelStatus) -> str:
    """What a model's clients get."""
    match model.serves:
        case "slot":
            return f"{model.version} serves"
        case "factory":
            return f"{model.version} of the factory serves: no slot can"
        case "nothing":
            return f"nothing serves: {model.absence or 'no release is installed'}"


def _show_trial(state: AgentState) -> None:
    if (trial := state.probation) is not None:
        out(
            f"slot {trial.slot} is on probation: {trial.inferences} inferences, {trial.failures} failed, {trial.served_s:.0f} s"
        )


def _show(status: AgentStatus) -> None:
    state = status.state
    up = format_seconds(status.uptime_s)
    out(f"{paint(state.device, 'bold')} ({status.site})  {status.url}  process {status.pid}, up {up}")
    if len(status.models) > 1:
        for model in status.models:
            out(f"\n{paint(model.name, 'bold')} on {model.channel}: {_serves(model)}")
            _show_state(model.state)
        out()
    else:
        _show_state(state)
        if status.models and status.models[0].serves != "slot":
            out(_serves(status.models[0]))
    _show_trial(state)
    if status.paused_until:
        out(f"{paint('paused', 'yellow')} updates wait until {status.paused_until:%Y-%m-%d %H:%M} UTC")
    doing = state.phase + (f" {state.intent}" if state.intent else "")
    out(f"phase {doing}; {status.requests} requests, {status.errors} errors; {status.rss_mb:.0f} MB resident")
    broker = "connected" if status.is_broker_connected else "not connected"
    out(f"broker {broker}; {status.outbox_messages} messages ({format_bytes(status.outbox_bytes)}) wait in the spool")
    refreshed = status.last_refresh_at.isoformat(timespec="seconds") if status.last_refresh_at else "never"
    out(f"repository last seen {refreshed}")
    if status.last_error:
        out(f"{paint('last error', 'red')} {status.last_error}")


@app.command()
def status(
    state_dir: Path | None = typer.Option(None, "--state-dir", help="The agent's state folder."),
    config: Path | None = typer.Option(None, "--config", metavar="FILE", help="The agent's settings."),
    url: str | None = typer.Option(None, "--url", help="Where the agent serves, for example http://127.0.0.1:8080."),
    json: bool = typer.Option(False, "--json", help="Print the record as JSON."),
) -> None:
    """Show what the agent serves and does. Exit 1 when it does not run: then only its state on disk is shown."""
    if url is not None:
        if not url.startswith(("http://", "https://")):
            raise UsageError("config.invalid", f"--url {url}: expected http://host:port.")
        answer = ask_status(url)
        if answer is None:
            hint = 'Start it with "edgekit agent run", or check the port.'
            raise EnvironmentFault("agent.not_running", f"{url}: no agent answers there.", hint=hint)
        out_json(answer) if json else _show(answer)
        return
    folder = settings_of(config, state_dir).state_path
    answer = status_of(folder)
    if answer is not None:
        out_json(answer) if json else _show(answer)
        return
    _show_stopped(folder, settings_of(config, state_dir).models, json=json)
    raise typer.Exit(1)


def _show_stopped(folder: Path, models: Collection[str], *, json: bool) -> None:
    from edgekit.agent.errands import read_state
    from edgekit.schema.base import decode_json
    from edgekit.schema.state import AgentState

    path = folder / "state.json"
    try:
        state = decode_json(path.read_bytes(), AgentState, name=str(path))
    except OSError as error:
        raise EnvironmentFault(
            "agent.no_state", f"{path}: {error.strerror}; no agent ran with this state folder.", hint="Give its --state-dir."
        ) from error
    note("the agent does not run; this is its state on disk", "yellow")
    if json:
        out_json(state)
        return
    _show_state(state)
    for name in models:
        if (further := read_state(folder / "models" / name)) is not None:
            out(f"\n{paint(name, 'bold')}")
            _show_state(further)


agent_identity.register(app)
agent_operation.register(app)
