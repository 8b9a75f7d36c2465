"""``edgekit fleet alerts|ack|silence|rules``: what needs somebody, and who has it in hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer

from edgekit.cli.console import Style, note, out, out_json, paint, table
from edgekit.cli.fleet_http import DEFAULT_URL, send_json
from edgekit.errors import UsageError

rules = typer.Typer(
    help="Alert rules: check a file, try it on a database, show those in force.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
URL = typer.Option(DEFAULT_URL, "--url", help="The fleet server.")
JSON = typer.Option(False, "--json", help="Print the records as JSON.")
_LEVELS: dict[str, tuple[str, Style]] = {"critical": ("▲", "red"), "warning": ("◆", "yellow"), "info": ("●", "cyan")}


def register(app: typer.Typer) -> None:
    """Add the commands to ``edgekit fleet``."""
    app.command()(alerts)
    app.command()(ack)
    app.command()(silence)
    app.add_typer(rules, name="rules")


def _labels(labels: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()) if value)


def _ago(time_ms: int) -> str:
    seconds = max(0, round(time.time() - time_ms / 1000))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def alerts(
    number: int = typer.Argument(0, metavar="[ID]", help="One alert, with its timeline."),
    everything: bool = typer.Option(False, "--all", help="Those that are over, too."),
    url: str = URL,
    json: bool = JSON,
) -> None:
    """What needs somebody now. Exit code 1 while a critical alert fires that nobody has in hand."""
    if number:
        view = send_json(url, f"/api/v1/alerts/{number}", None, method="GET")
        out_json(view) if json else _show(view)
        return
    page = send_json(url, f"/api/v1/alerts?limit=200{'' if everything else '&state=firing'}", None, method="GET")
    if json:
        out_json(page)
    else:
        out(
            table(
                ["id", "level", "alert", "labels", "value", "for", "state"], [_row(view) for view in page["alerts"]], right=[0]
            )
        )
        if not page["alerts"]:
            note("Nothing fires.", "green")
    urgent = [
        view
        for view in page["alerts"]
        if view["alert"]["level"] == "critical" and view["alert"]["state"] == "firing" and not view["is_acknowledged"]
    ]
    if urgent:
        raise typer.Exit(1)


def _row(view: dict[str, Any]) -> list[str]:
    alert = view["alert"]
    symbol, colour = _LEVELS[alert["level"]]
    state = alert["muted"] or (f"acknowledged by {alert['acknowledged_by']}" if view["is_acknowledged"] else alert["state"])
    return [
        str(alert["id"]),
        paint(f"{symbol} {alert['level']}", colour),
        alert["summary"] or alert["rule"],
        _labels(alert["labels"]),
        f"{alert['value']:.4g} {alert['threshold']}",
        _ago(alert["fired_ms"]) if alert["fired_ms"] else "",
        state,
    ]


def _show(view: dict[str, Any]) -> None:
    alert = view["alert"]
    symbol, colour = _LEVELS[alert["level"]]
    level = paint(f"{symbol} {alert['level']}", colour)
    out(f"{level}  {alert['summary'] or alert['rule']}  {_labels(alert['labels'])}")
    out(f"{alert['rule']}: {alert['value']:.4g}, {alert['threshold']}; {alert['samples']} samples; {alert['state']}")
    for line in alert["top"]:
        out(f"  {line}")
    for name, value in alert["evidence"].items():
        out(f"  {name}: {value}")
    if alert["runbook"]:
        out(f"what to do: {alert['runbook']}")
    rows = [[_ago(item["time_ms"]), item["actor"], item["what"], item["detail"]] for item in view["timeline"]]
    out(table(["ago", "who", "what", "detail"], rows))
    for item in view["deliveries"]:
        out(f"{item['status']}: {item['kind']} to {item['contact']} ({item['channel']}) {item['error']}".rstrip())


def ack(
    number: int = typer.Argument(..., metavar="ID"),
    comment: str = typer.Option("", "--comment", help="What you are going to do."),
    for_: str = typer.Option("", "--for", metavar="TIME", help="4h: then it escalates again.  [default: as long as it lasts]"),
    undo: bool = typer.Option(False, "--undo", help="Nobody has it in hand any more."),
    url: str = URL,
) -> None:
    """Say that you have an alert in hand: nobody else is told."""
    from edgekit.cli.agent_operation import parse_duration

    body = {"comment": comment, "for_min": parse_duration(for_, "--for") / 60 if for_ else 0.0}
    send_json(url, f"/api/v1/alerts/{number}/{'unack' if undo else 'ack'}", body)
    out(f"alert {number} is {'in no hands' if undo else 'in yours'}{f' for {for_}' if for_ else ''}")


def silence(
    matchers: list[str] = typer.Argument(None, metavar="[LABEL=PATTERN...]", help="rule=input-*, model=kws, site=lab."),
    for_: str = typer.Option("2h", "--for", metavar="TIME", help="How long."),
    daily: str = typer.Option("", "--daily", metavar="HOURS", help="Only within 02:00-04:00 of each day, UTC."),
    why: str = typer.Option("", "--why", help="For those who wonder."),
    end: int = typer.Option(0, "--end", metavar="ID", help="End a silence."),
    url: str = URL,
    json: bool = JSON,
) -> None:
    """Tell nobody of alerts that match, for a time; without a pattern: list the silences."""
    from edgekit.cli.agent_operation import parse_duration

    if end:
        send_json(url, f"/api/v1/silences/{end}", None, method="DELETE")
        out(f"silence {end} is over")
        return
    if not matchers:
        found = send_json(url, "/api/v1/silences", None, method="GET")
        if json:
            out_json(found)
            return
        rows = [[str(s["id"]), _labels(s["matchers"]), s["daily"], s["by"], s["why"]] for s in found]
        out(table(["id", "matches", "daily", "by", "why"], rows, right=[0]))
        return
    pairs = [matcher.partition("=") for matcher in matchers]
    wrong = next((matcher for matcher, (_, sign, value) in zip(matchers, pairs, strict=True) if not sign or not value), "")
    if wrong:
        raise UsageError("silence.matchers", f"{wrong}: expected LABEL=PATTERN, for example model=kws.")
    body = {
        "matchers": {label: pattern for label, _, pattern in pairs},
        "for_min": parse_duration(for_, "--for") / 60,
        "daily": daily,
        "why": why,
    }
    made = send_json(url, "/api/v1/silences", body)
    out(f"silence {made['id']} for {for_}")


@rules.command()
def check(file: Path = typer.Argument(..., metavar="FILE")) -> None:
    """Whether a rules file is right; every mistake is named."""
    from edgekit.fleet.alerting.rules import load_rules, parse_rules

    book = load_rules(str(file))
    own = parse_rules(file.read_text(), file=str(file))
    out(f"{file}: {len(own.rules)} rules of its own, {len(book.rules)} with those that come with edgekit; all right")


@rules.command("test")
def try_rules(
    file: Path = typer.Argument(None, metavar="[FILE]", help="Rules beside those that come with edgekit."),
    database: str = typer.Option("edgekit-fleet.db", "--db", help="SQLite file, or a SQLAlchemy URL."),
    json: bool = JSON,
) -> None:
    """What would fire on a database now, if it has lasted long enough. Nobody is told and nothing is written."""
    import msgspec

    from edgekit.fleet.alerting import engine
    from edgekit.fleet.alerting.rules import load_rules
    from edgekit.fleet.alerting.sources import store_signals
    from edgekit.fleet.config import FleetConfig
    from edgekit.fleet.jobs import Jobs
    from edgekit.fleet.services import Services
    from edgekit.fleet.store import Store

    if "://" not in database and not Path(database).is_file():
        raise UsageError("fleet.database", f"{database}: no such file.", hint="Give the --db of edgekit fleet serve.")
    book = load_rules(str(file) if file else "")
    at_once = msgspec.structs.replace(book, rules=tuple(msgspec.structs.replace(rule, for_ms=0) for rule in book.rules))
    store = Store(database)
    try:
        services = Services(config=FleetConfig(), store=store, jobs=Jobs(store, owner="rules-test"))
        now_ms = time.time_ns() // 1_000_000
        found = engine.step((), store_signals(services, now_ms), at_once, (), now_ms).alerts
    finally:
        store.close()
    if json:
        out_json(found)
        return
    rows = [[alert.level, alert.rule, _labels(alert.labels), f"{alert.value:.4g} {alert.threshold}"] for alert in found]
    out(table(["level", "rule", "labels", "value"], rows))
    if not rows:
        note("Nothing would fire.", "green")


@rules.command()
def show(url: str = URL, json: bool = JSON) -> None:
    """The rules in force on a server."""
    state = send_json(url, "/api/v1/rules", None, method="GET")
    if json:
        out_json(state)
        return
    rows = []
    for rule in state["book"]["rules"]:
        bound = f"above {rule['above']:g}" if rule["above"] is not None else f"below {rule['below']:g}"
        lasting = f" for {rule['for_ms'] // 1000} s" if rule["for_ms"] else ""
        off = "" if rule["is_enabled"] else "off"
        rows.append([rule["name"], rule["level"], f"{rule['signal']} {bound}{lasting}", ", ".join(rule["actions"]), off])
    out(table(["rule", "level", "fires", "does", ""], rows))
    if state["error"]:
        note(f"the file was refused when it changed: {state['error']}", "red")


@rules.command("tell")
def tell(name: str = typer.Argument(..., metavar="CONTACT"), url: str = URL) -> None:
    """Send a test message to a contact."""
    found = send_json(url, f"/api/v1/contacts/{name}/test", {})
    out(f"{found['messages']} test messages are on their way; see edgekit fleet alerts or /api/v1/deliveries")
