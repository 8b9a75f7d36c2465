"""``edgekit fleet experiment``: two releases side by side, until enough is known."""

from __future__ import annotations

from typing import Any

import typer

from edgekit.cli.console import Style, note, out, out_json, paint, table
from edgekit.cli.fleet_http import DEFAULT_URL, send_json
from edgekit.errors import UsageError

app = typer.Typer(
    help="Champion against challenger: two releases side by side on split devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
URL = typer.Option(DEFAULT_URL, "--url", help="The fleet server.")
JSON = typer.Option(False, "--json", help="Print the records as JSON.")
_COLOURS: dict[str, Style] = {"challenger is better": "green", "challenger is worse": "red", "no difference": "cyan"}
_STATES = ("accuracy", "error_share", "rejected_share")


@app.command()
def start(
    challenger: str = typer.Argument(..., metavar="MODEL@VERSION", help="The new release."),
    against: str = typer.Option(..., "--against", metavar="VERSION", help="The champion, which the devices serve now."),
    to: str = typer.Option("", "--to", metavar="SELECTOR", help="Which devices; they must serve the champion."),
    split: float = typer.Option(0.5, "--split", min=0.01, max=0.99, help="The challenger's share of them."),
    metric: str = typer.Option("accuracy", "--metric", help="accuracy (of labelled answers), error_share or rejected_share."),
    margin: float = typer.Option(0.02, "--margin", help="A difference below that is none."),
    days: float = typer.Option(14.0, "--days", help="After that it ends undecided."),
    reason: str = typer.Option("", "--reason", help="Why, for the audit log."),
    url: str = URL,
    json: bool = JSON,
) -> None:
    """Begin an experiment. Look as often as you like: the interval holds at all times at once."""
    model, at, version = challenger.partition("@")
    if not at or not model or not version:
        raise UsageError("experiment.request", f"{challenger}: not a release.", hint="Give MODEL@VERSION.")
    if metric not in _STATES:
        raise UsageError("experiment.request", f"--metric {metric}: choose from {', '.join(_STATES)}.")
    body = {
        "model": model,
        "challenger": version,
        "champion": against.removeprefix(f"{model}@"),
        "to": to,
        "split": split,
        "metric": metric,
        "margin": margin,
        "days": days,
        "reason": reason,
    }
    begun = send_json(url, "/api/v1/experiments", body)
    if json:
        out_json(begun)
        return
    out(f"experiment {begun['id']} has begun")
    note(f"Look at it: edgekit fleet experiment show {begun['id']}", "dim")


def _verdict(view: dict[str, Any]) -> str:
    judgement = view["judgement"]
    verdict = judgement["verdict"] if judgement else "keep going"
    return paint(verdict, _COLOURS[verdict]) if verdict in _COLOURS else verdict


@app.command("list")
def list_experiments(url: str = URL, json: bool = JSON) -> None:
    """Experiments, newest first."""
    found = send_json(url, "/api/v1/experiments", None, method="GET")
    if json:
        out_json(found)
        return
    rows = [
        [
            str(view["id"]),
            view["spec"]["request"]["model"],
            f"{view['spec']['request']['challenger']} against {view['spec']['request']['champion']}",
            view["spec"]["request"]["metric"],
            view["state"],
            _verdict(view),
        ]
        for view in found
    ]
    out(table(["id", "model", "releases", "metric", "state", "verdict"], rows, right=[0]))
    if not rows:
        note("No experiment yet: edgekit fleet experiment start --help", "dim")


@app.command()
def show(number: int = typer.Argument(..., metavar="ID"), url: str = URL, json: bool = JSON) -> None:
    """Both sides, the difference with its interval, and what may be said."""
    view = send_json(url, f"/api/v1/experiments/{number}", None, method="GET")
    if json:
        out_json(view)
        return
    request, judgement = view["spec"]["request"], view["judgement"] or {}
    out(f"experiment {number}  {request['model']}  {view['state']}  {_verdict(view)}  {view['reason']}".rstrip())
    rows = []
    for arm in ("champion", "challenger"):
        value = judgement.get(arm)
        rows.append(
            [
                arm,
                request[arm],
                str(view["devices"].get(arm, 0)),
                str(view["serving"].get(arm, 0)),
                str(judgement.get(f"{arm}_trials", 0)),
                "?" if value is None else f"{value:.4f}",
            ]
        )
    counted = "labelled" if request["metric"] == "accuracy" else "requests"
    out(table(["side", "release", "devices", "serve it", counted, request["metric"]], rows, right=[2, 3, 4, 5]))
    if judgement.get("difference") is not None:
        out(f"difference {judgement['difference']:+.4f}, between {judgement['low']:+.4f} and {judgement['high']:+.4f}")


@app.command()
def stop(
    number: int = typer.Argument(..., metavar="ID"),
    keep: str = typer.Option("", "--keep", help="champion or challenger: all its devices get this one; else they stay."),
    reason: str = typer.Option("", "--reason", help="Why, for the audit log."),
    url: str = URL,
) -> None:
    """End an experiment."""
    if keep not in {"", "champion", "challenger"}:
        raise UsageError("experiment.request", f"--keep {keep}: choose champion or challenger.")
    view = send_json(url, f"/api/v1/experiments/{number}/stop", {"keep": keep or None, "reason": reason})
    out(f"experiment {number} is {view['state']}")
    if keep == "challenger":
        release = f"{view['spec']['request']['model']}@{view['spec']['request']['challenger']}"
        note(f"Bring it to the other devices: edgekit fleet rollout start {release}", "dim")
