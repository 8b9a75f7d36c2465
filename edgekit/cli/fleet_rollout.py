"""``edgekit fleet rollout`` and ``edgekit fleet group``: bring a release to a part of the fleet, in waves."""

from __future__ import annotations

import time
import urllib.parse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from edgekit.cli.console import Style, note, out, out_json, paint, table
from edgekit.cli.fleet_http import DEFAULT_URL, send_json
from edgekit.errors import UsageError

_SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
app = typer.Typer(help="Bring a release to devices in waves, with gates; halt it, take it back.", **_SETTINGS)
groups = typer.Typer(help="Groups of devices: lists, or selectors that are looked up anew each time.", **_SETTINGS)
URL = typer.Option(DEFAULT_URL, "--url", help="The fleet server.")
JSON = typer.Option(False, "--json", help="Print the records as JSON.")
REASON = typer.Option("", "--reason", help="Why, for the audit log.")
_SYMBOLS: dict[str, tuple[str, Style]] = {
    "running": ("▶", "cyan"),
    "paused": ("Ⅱ", "yellow"),
    "halted": ("■", "red"),
    "rolling_back": ("↩", "red"),
    "rolled_back": ("↩", "yellow"),
    "cancelled": ("∅", "dim"),
    "done": ("✓", "green"),
}
_MAX_NAMED = 12


@app.command()
def start(
    release: str = typer.Argument("", metavar="[MODEL@VERSION]", help="As the repository lists it; or give --plan."),
    to: str = typer.Option("", "--to", metavar="SELECTOR", help="site=lab,arch=aarch64,label.camera=dome,group=pilots,…"),
    channel: str = typer.Option("", "--channel", help="Only a release of this channel."),
    waves: str = typer.Option("canary:5,10%,50%,100%", "--waves", help="Numbers of devices, or shares."),
    gates: list[str] = typer.Option(
        ["error_share<=2%", "latency_p95_ratio<=1.5", "critical_alerts<=0"],
        "--gate",
        metavar="GATE",
        help="METRIC<=LIMIT; repeatable. latency_p95_ratio, latency_p95_ms, error_share, rejected_share, score_psi, "
        "critical_alerts; `min 500` behind it asks for samples.",
    ),
    soak: str = typer.Option("30min", "--soak", metavar="TIME", help="How long a wave must hold before the next."),
    deadline: str = typer.Option("1d", "--deadline", metavar="TIME", help="After that a device that says nothing is silent."),
    max_failed: float = typer.Option(0.02, "--max-failed", min=0, max=1, help="Share of devices that may fail."),
    required: float = typer.Option(0.95, "--required-success", min=0, max=1, help="Share of a wave that must commit."),
    keep: bool = typer.Option(False, "--keep-on-halt", help="A halt takes nothing back from devices that have it."),
    approve: bool = typer.Option(False, "--approve", help="A person lets each wave begin."),
    jitter_s: float = typer.Option(0.0, "--jitter", min=0, metavar="SECONDS", help="Devices fetch within this span."),
    not_before: str = typer.Option("", "--not-before", metavar="TIME", help="2026-12-01T02:00Z: devices wait until then."),
    is_metered: bool = typer.Option(False, "--metered", help="Bytes cost money: deltas and resumed downloads."),
    plan: Path | None = typer.Option(None, "--plan", metavar="FILE", help="The same as TOML; options here do not count then."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Name the devices of each wave, and begin nothing."),
    reason: str = REASON,
    url: str = URL,
    json: bool = JSON,
) -> None:
    """Begin a rollout, or with --dry-run see whom it would reach.

    A wave begins when enough devices of the one before have committed the release, that has held for the soak time, and every
    gate holds. A device that says nothing has not succeeded. Failures beyond the bound halt it and take it back by itself.
    """
    from edgekit.cli.agent_operation import parse_duration

    if plan is not None:
        body = _read_plan(plan)
    else:
        model, at, version = release.partition("@")
        if not at or not model or not version:
            raise UsageError(
                "rollout.release", f"{release or 'nothing'}: not a release.", hint="Give MODEL@VERSION, or --plan FILE."
            )
        body = {
            "model": model,
            "version": version,
            "channel": channel,
            "to": to,
            "waves": waves,
            "gates": gates,
            "soak_min": parse_duration(soak, "--soak") / 60,
            "deadline_min": parse_duration(deadline, "--deadline") / 60,
            "max_failed": max_failed,
            "required_success": required,
            "is_rolled_back_on_halt": not keep,
            "needs_approval": approve,
            "jitter_s": jitter_s,
            "is_metered": is_metered,
        }
        if not_before:
            from edgekit.cli.moment import parse_moment

            body["not_before"] = parse_moment(not_before, flag="--not-before", now=datetime.now(UTC)).isoformat()
    body["reason"] = reason or body.get("reason", "")
    if dry_run:
        _show_dry_run(send_json(url, "/api/v1/rollouts/dry-run", body), json)
        return
    begun = send_json(url, "/api/v1/rollouts", body)
    if json:
        out_json(begun)
        return
    out(f"rollout {begun['id']} has begun")
    note(f"Watch it: edgekit fleet rollout show {begun['id']} --watch", "dim")


def _read_plan(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            "rollout.plan", f"{path}: cannot be read: {error}.", hint="See docs/rollouts.md for an example."
        ) from error


def _show_dry_run(found: dict[str, Any], json: bool) -> None:
    if json:
        out_json(found)
        return
    rows = []
    for wave, devices, allowed in zip(found["spec"]["waves"], found["waves"], found["allowed_failures"], strict=True):
        named = ", ".join(devices[:_MAX_NAMED]) + (
            f" and {len(devices) - _MAX_NAMED} more" if len(devices) > _MAX_NAMED else ""
        )
        rows.append([wave["name"], str(len(devices)), str(allowed), named])
    out(table(["wave", "devices", "may fail so far", "who"], rows, right=[1, 2]))
    if found["has_it"]:
        note(f"{len(found['has_it'])} of them serve the release already.", "dim")
    note("Nothing was begun. --json names every device.", "dim")


@app.command("list")
def list_rollouts(url: str = URL, json: bool = JSON) -> None:
    """Rollouts, newest first."""
    found = send_json(url, "/api/v1/rollouts", None, method="GET")
    if json:
        out_json(found)
        return
    rows = [
        [
            str(view["id"]),
            f"{view['spec']['model']}@{view['spec']['version']}",
            _state(view),
            _bar(view),
            f"{sum(wave['committed'] for wave in view['waves'])}/{view['devices']}",
            view["progress"]["reason"] or view["waits_for"],
        ]
        for view in found
    ]
    out(table(["id", "release", "state", "waves", "committed", "why"], rows, right=[0, 4]))
    if not rows:
        note("No rollout yet. Begin one: edgekit fleet rollout start --help", "dim")


def _state(view: dict[str, Any]) -> str:
    state = view["progress"]["state"]
    symbol, colour = _SYMBOLS[state]
    return paint(f"{symbol} {state.replace('_', ' ')}", colour)


def _bar(view: dict[str, Any]) -> str:
    """A cell for each wave: how much of it has committed."""
    cells = " ▁▂▃▄▅▆▇█"
    shares = [wave["committed"] / wave["devices"] if wave["devices"] else 1.0 for wave in view["waves"]]
    return "".join(cells[round(share * 8)] for share in shares)


@app.command()
def show(
    number: int = typer.Argument(..., metavar="ID"),
    watch: bool = typer.Option(False, "--watch", help="Again each second, until it is settled."),
    stage: str = typer.Option("", "--stage", help="List devices: waiting, asked, committed, failed, reverting, reverted."),
    url: str = URL,
    json: bool = JSON,
) -> None:
    """One rollout: its waves, gates, and what it waits for."""
    if stage:
        query = urllib.parse.urlencode({"stage": stage, "limit": 1000})
        page = send_json(url, f"/api/v1/rollouts/{number}/devices?{query}", None, method="GET")
        if json:
            out_json(page)
            return
        out(
            table(
                ["device", "stage", "detail"],
                [[f"{d['site']}/{d['device']}", d["stage"], d["detail"]] for d in page["devices"]],
            )
        )
        return
    last = ""
    while True:
        view = send_json(url, f"/api/v1/rollouts/{number}", None, method="GET")
        if json and not watch:
            out_json(view)
            return
        text = _describe(view)
        if text != last:
            out(text)
            last = text
        if not watch or view["progress"]["state"] in {"done", "halted", "rolled_back", "cancelled"}:
            return
        time.sleep(1.0)


def _describe(view: dict[str, Any]) -> str:
    spec, progress = view["spec"], view["progress"]
    head = f"rollout {view['id']}  {spec['model']}@{spec['version']}  {_state(view)}"
    why = progress["reason"] or (f"waits for {view['waits_for']}" if view["waits_for"] else "")
    rows = [
        [("→ " if at == progress["wave"] and progress["state"] == "running" else "  ") + wave["name"]]
        + [str(wave[name] or "") for name in ("devices", "committed", "pending", "silent", "failed", "reverted", "waiting")]
        for at, wave in enumerate(view["waves"])
    ]
    parts = [head, *([why] if why else [])]
    parts.append(
        table(
            ["  wave", "devices", "committed", "pending", "silent", "failed", "reverted", "waiting"],
            rows,
            right=list(range(1, 8)),
        )
    )
    parts.append(f"{view['allowed_failures']} failures are allowed in the waves begun so far")
    for reading in view["gates"]:
        gate = reading["gate"]
        value = "?" if reading["value"] is None else f"{reading['value']:.4g}"
        symbol = {"ok": "✓", "violated": "✗", "unknown": "?"}[reading["verdict"]]
        control = "" if reading["control"] is None else f", control {reading['control']:.4g}"
        parts.append(
            f"{symbol} {gate['metric']} {gate['comparison']} {gate['limit']:g}: {value}{control} ({reading['samples']} samples)"
        )
    return "\n".join(parts)


def _say(number: int, verb: str, reason: str, url: str) -> None:
    view = send_json(url, f"/api/v1/rollouts/{number}/{verb}", {"reason": reason})
    out(f"rollout {number} is {_state(view)}")


@app.command()
def pause(number: int = typer.Argument(..., metavar="ID"), reason: str = REASON, url: str = URL) -> None:
    """Ask nobody else for now; devices that were asked go on."""
    _say(number, "pause", reason, url)


@app.command()
def resume(number: int = typer.Argument(..., metavar="ID"), reason: str = REASON, url: str = URL) -> None:
    """Go on with a paused or halted rollout; failures so far are forgiven."""
    _say(number, "resume", reason, url)


@app.command()
def approve(number: int = typer.Argument(..., metavar="ID"), reason: str = REASON, url: str = URL) -> None:
    """Let the next wave begin."""
    _say(number, "approve", reason, url)


@app.command()
def halt(number: int = typer.Argument(..., metavar="ID"), reason: str = REASON, url: str = URL) -> None:
    """Nobody else gets it; devices that have it keep it."""
    _say(number, "halt", reason, url)


@app.command()
def rollback(number: int = typer.Argument(..., metavar="ID"), reason: str = REASON, url: str = URL) -> None:
    """Nobody else gets it, and devices that have it go back to what they served before."""
    _say(number, "rollback", reason, url)


@app.command()
def cancel(number: int = typer.Argument(..., metavar="ID"), reason: str = REASON, url: str = URL) -> None:
    """End a halted or paused rollout for good, so that another may begin."""
    _say(number, "cancel", reason, url)


@groups.command("list")
def list_groups(url: str = URL, json: bool = JSON) -> None:
    """Every group, with how many devices are in it now."""
    found = send_json(url, "/api/v1/groups", None, method="GET")
    if json:
        out_json(found)
        return
    out(
        table(
            ["group", "devices", "selector", "note"],
            [[g["name"], str(g["devices"]), g["selector"], g["note"]] for g in found],
            right=[1],
        )
    )
    if not found:
        note("No group yet: edgekit fleet group put pilots --device lab/cam-1", "dim")


@groups.command("show")
def show_group(name: str = typer.Argument(...), url: str = URL, json: bool = JSON) -> None:
    """Who is in a group now."""
    found = send_json(url, f"/api/v1/groups/{urllib.parse.quote(name)}", None, method="GET")
    out_json(found) if json else out("\n".join(found))


@groups.command("put")
def put_group(
    name: str = typer.Argument(...),
    selector: str = typer.Option("", "--selector", help="Who is in it, looked up anew each time."),
    devices: list[str] = typer.Option([], "--device", metavar="SITE/NAME", help="Or a list; repeatable."),
    text: str = typer.Option("", "--note", help="What it is for."),
    url: str = URL,
) -> None:
    """Make a group, or say anew who is in it."""
    body = {"selector": selector, "devices": devices, "note": text}
    send_json(url, f"/api/v1/groups/{urllib.parse.quote(name)}", body, method="PUT")
    out(f"group {name} is kept")


@groups.command("remove")
def remove_group(name: str = typer.Argument(...), url: str = URL) -> None:
    """Forget a group; its devices stay."""
    send_json(url, f"/api/v1/groups/{urllib.parse.quote(name)}", None, method="DELETE")
    out(f"group {name} is forgotten")
