"""``edgekit fleet``: the server that devices report to."""

from __future__ import annotations

import http.client
import json as json_module
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import typer

from edgekit.cli import fleet_command
from edgekit.cli.console import note, out, out_json, paint, table
from edgekit.errors import EnvironmentFault, UsageError

app = typer.Typer(
    help="The fleet server: serve it, list devices, command them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
TOKEN_VARIABLE = "EDGEKIT_FLEET_TOKEN"  # noqa: S105 - the variable's name
_SYMBOLS = {"online": "●", "stale": "◐", "offline": "○"}
_PAGE = 500
app.command()(fleet_command.command)


@app.command()
def serve(
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on."),
    port: int = typer.Option(8420, "--port", min=1, max=65535, help="Port of dashboard and API."),
    database: str = typer.Option("edgekit-fleet.db", "--db", help="SQLite file, or a SQLAlchemy URL."),
    broker: str = typer.Option("embedded", "--broker", help="embedded, or mqtts://[user:password@]host[:port]."),
    broker_port: int = typer.Option(1883, "--broker-port", min=1, max=65535, help="Port of the embedded broker (loopback)."),
    client_id: str = typer.Option("edgekit-fleet", "--client-id", help="This server's name at the broker."),
    group: str = typer.Option("", "--group", help="Share the ingest with the other servers of this group."),
    ca_file: str = typer.Option("", "--ca", help="Certificates to trust for mqtts.  [default: the system's]"),
    allow_remote: bool = typer.Option(False, "--allow-remote", help=f"Listen off loopback; needs a token in {TOKEN_VARIABLE}."),
    allow_host: list[str] = typer.Option(
        [], "--allow-host", help="A name under which a reverse proxy may open the pages without a token."
    ),
    allow_insecure: bool = typer.Option(False, "--allow-insecure", help="Accept a broker without TLS off loopback."),
) -> None:
    """Ingest what devices report, store it, and serve the dashboard and /api/v1.

    On loopback nothing else is needed: the MQTT broker is embedded. In the field, put your own broker behind --broker, and a
    reverse proxy with TLS in front of --port.
    """
    from edgekit.fleet.config import FleetConfig
    from edgekit.fleet.server import FleetServer
    from edgekit.loopback import is_loopback

    token = os.environ.get(TOKEN_VARIABLE, "")
    if not is_loopback(host) and not (allow_remote and token):
        raise UsageError(
            "config.insecure",
            f"--host {host}: everyone on the network could see the fleet.",
            hint=f"Set a token in {TOKEN_VARIABLE} and give --allow-remote, with TLS in front; or keep 127.0.0.1.",
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s level=%(levelname)s logger=%(name)s %(message)s")
    config = FleetConfig(
        host=host,
        port=port,
        database=database,
        broker=broker,
        broker_port=broker_port,
        token=token,
        ca_file=ca_file,
        client_id=client_id,
        group=group,
        allowed_hosts=tuple(allow_host),
    )
    server = FleetServer(config, is_plain_allowed=allow_insecure)

    def ready() -> None:
        note(f"dashboard  {paint(server.url, 'bold')}")
        note(f"API        {server.url}/api/v1/openapi.json")
        note(f"broker     {server.address}{' (embedded)' if server.embedded else ''}")
        note("Ctrl-C ends it.", "dim")

    server.run(ready)


def get_json(url: str, path: str) -> Any:
    """What a fleet server answers.

    Raises:
        UsageError: ``fleet.url``.
        EnvironmentFault: ``fleet.unreachable`` or ``fleet.refused``.
    """
    request = urllib.request.Request(url.rstrip("/") + path)  # noqa: S310 - checked below
    if request.type not in {"http", "https"}:
        raise UsageError("fleet.url", f"{url}: not an http(s) URL.", hint="Give --url http://127.0.0.1:8420.")
    if token := os.environ.get(TOKEN_VARIABLE):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - the same
            return json_module.load(answer)
    except urllib.error.HTTPError as error:
        is_closed = error.code in {http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN}
        hint = f"Set the server's token in {TOKEN_VARIABLE}." if is_closed else "Is this the fleet server's --url?"
        raise EnvironmentFault("fleet.refused", f"{url}: answers {error.code} {error.reason}.", hint=hint) from error
    except ValueError as error:
        text = f"{url}: answers something else than JSON."
        raise EnvironmentFault("fleet.refused", text, hint="Is this the fleet server's --url?") from error
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise EnvironmentFault(
            "fleet.unreachable", f"{url}: the fleet server does not answer: {reason}.", hint="Start it: edgekit fleet serve"
        ) from error


def all_devices(url: str, state: str) -> list[dict[str, Any]]:
    """Every device, page by page; ``state`` as ``/api/v1/devices`` takes it."""
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        query = urllib.parse.urlencode({"state": state, "after": after, "limit": _PAGE})
        page = get_json(url, f"/api/v1/devices?{query}")
        found += page["devices"]
        after = page["next"]
        if not after:
            return found


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ago(now_s: float, time_ms: int) -> str:
    seconds = max(0, round(now_s - time_ms / 1000))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def _all_stored(database: str, state: str) -> list[dict[str, Any]]:
    """The same from the database, without the server."""
    from pathlib import Path

    import msgspec

    from edgekit.fleet.store import Store

    if "://" not in database and not Path(database).is_file():
        raise UsageError("fleet.database", f"{database}: no such file.", hint="Give the --db of edgekit fleet serve.")
    store = Store(database)
    try:
        now_ms, after = time.time_ns() // 1_000_000, ""
        found: list[dict[str, Any]] = []
        while True:
            page = store.devices(now_ms=now_ms, state=state, after=after, limit=_PAGE)
            found += [msgspec.to_builtins(view) for view in page.devices]
            after = page.next
            if not after:
                return found
    finally:
        store.close()


@app.command()
def devices(
    url: str = typer.Option("http://127.0.0.1:8420", "--url", help="The fleet server."),
    database: str = typer.Option("", "--db", help="Read this database instead of asking a server."),
    state: str = typer.Option("", "--state", help="Only online, stale or offline devices."),
    json: bool = typer.Option(False, "--json", help="Print the records as JSON."),
) -> None:
    """List devices with state, release, latency, throughput and when they were last seen."""
    if state not in {"", "online", "stale", "offline"}:
        raise UsageError("fleet.state", f"--state {state}: no such state.", hint="Choose online, stale or offline.")
    found = _all_stored(database, state) if database else all_devices(url, state)
    if json:
        out_json(found)
        return
    now = time.time()
    rows = [
        [
            f"{item['site']}/{item['device']}",
            f"{_SYMBOLS[item['state']]} {item['state']}",
            f"{item['model']}@{item['version']}" if item["model"] else "",
            item["model_digest"],
            _milliseconds(item["latency_p50_ms"]),
            _milliseconds(item["latency_p99_ms"]),
            "" if item["throughput_per_s"] is None else f"{item['throughput_per_s']:.1f}",
            str(item["refused"] or ""),
            _ago(now, item["last_seen_ms"]),
        ]
        for item in found
    ]
    out(
        table(
            ["device", "state", "release", "digest", "p50 ms", "p99 ms", "req/s", "refused", "last seen"],
            rows,
            right=[4, 5, 6, 7],
        )
    )
    if not rows:
        note("No device has reported yet. Start one: edgekit agent run --help", "dim")
