"""``edgekit fleet``: the server that devices report to."""

from __future__ import annotations

import logging
import os
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import typer

from edgekit.cli import (
    fleet_alerts,
    fleet_bridge,
    fleet_command,
    fleet_database,
    fleet_experiment,
    fleet_identity,
    fleet_rollout,
    fleet_simulate,
    fleet_users,
)
from edgekit.cli.console import note, out, out_json, paint, table
from edgekit.cli.fleet_http import TOKEN_VARIABLE, get_json
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.fleet.services import SignDesired

app = typer.Typer(
    help="The fleet server: serve it, list devices, command them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_SYMBOLS = {"online": "●", "stale": "◐", "offline": "○"}
_PAGE = 500
app.command()(fleet_command.command)
fleet_identity.register(app)
fleet_users.register(app)
app.command()(fleet_simulate.simulate)
app.add_typer(fleet_bridge.app, name="bridge")
fleet_alerts.register(app)
app.add_typer(fleet_rollout.app, name="rollout")
app.add_typer(fleet_rollout.groups, name="group")
app.add_typer(fleet_database.app, name="db")
app.add_typer(fleet_experiment.app, name="experiment")


@app.command()
def serve(
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on."),
    port: int = typer.Option(8420, "--port", min=1, max=65535, help="Port of dashboard and API."),
    database: str = typer.Option("edgekit-fleet.db", "--db", help="SQLite file, or a SQLAlchemy URL."),
    broker: str = typer.Option("embedded", "--broker", help="embedded, or mqtts://[user:password@]host[:port]."),
    broker_port: int = typer.Option(1883, "--broker-port", min=1, max=65535, help="Port of the embedded broker (loopback)."),
    client_id: str = typer.Option("edgekit-fleet", "--client-id", help="This server's name at the broker."),
    group: str = typer.Option("", "--group", help="Share the ingest with the other servers of this group."),
    role: str = typer.Option("all", "--role", help="all; web: ingest nothing; ingest: nothing else, beside the others' web."),
    ca_file: str = typer.Option("", "--ca", help="Certificates to trust for mqtts.  [default: the system's]"),
    cert_file: str = typer.Option("", "--cert", metavar="FILE", help="This server's certificate for the broker."),
    key_file: str = typer.Option("", "--cert-key", metavar="FILE", help="Its key."),
    repository: str = typer.Option("", "--repository", metavar="URL", help="The update repository: releases, drift baselines."),
    repository_root: str = typer.Option("", "--repository-root", metavar="FILE", help="Its metadata/1.root.json."),
    fleet_keys: list[Path] = typer.Option(
        [], "--fleet-key", metavar="KEY", help="Signs what devices shall run; they have its .pub as fleet_keys. Repeatable."
    ),
    rules: str = typer.Option("", "--rules", metavar="FILE", help="Alert rules beside those that come with edgekit."),
    watch_grace: str = typer.Option(
        "2min", "--watch-grace", metavar="TIME", help="The watch judges an interval so long after its end."
    ),
    public_url: str = typer.Option("", "--public-url", metavar="URL", help="Where people open the dashboard, for links."),
    allow_private_webhooks: bool = typer.Option(
        False, "--allow-private-webhooks", help="Webhooks may go to addresses of this server's own networks."
    ),
    authority: str = typer.Option(
        "", "--authority", metavar="DIR", help='Enrol devices with the authority of "edgekit fleet ca init".'
    ),
    broker_dir: str = typer.Option("", "--broker-dir", metavar="DIR", help="Keep the broker's revocation list and rules here."),
    device_broker: str = typer.Option("", "--device-broker", metavar="URL", help="Told to devices at their enrolment."),
    device_repository: str = typer.Option("", "--device-repository", metavar="URL", help="The same."),
    tls_cert: str = typer.Option("", "--tls-cert", metavar="FILE", help="Serve over TLS with this certificate chain."),
    tls_key: str = typer.Option("", "--tls-key", metavar="FILE", help="Its key."),
    client_ca: str = typer.Option("", "--client-ca", metavar="FILE", help="With TLS: only clients with certificates of these."),
    crl: str = typer.Option("", "--crl", metavar="FILE", help="And none that these revocation lists name."),
    oidc: str = typer.Option("", "--oidc", metavar="FILE", help="Log people in at an OpenID Connect provider: its settings."),
    allow_remote: bool = typer.Option(
        False, "--allow-remote", help=f"Listen off loopback; needs users, --oidc, or a token in {TOKEN_VARIABLE}."
    ),
    allow_host: list[str] = typer.Option(
        [], "--allow-host", help="A name under which a reverse proxy may open the pages without a token."
    ),
    allow_insecure: bool = typer.Option(False, "--allow-insecure", help="Accept a broker without TLS off loopback."),
) -> None:
    """Ingest what devices report, store it, and serve the dashboard and /api/v1.

    On loopback nothing else is needed: the MQTT broker is embedded. In the field, put your own broker behind --broker, and a
    reverse proxy with TLS in front of --port.
    """
    from edgekit.cli.agent_operation import parse_duration
    from edgekit.fleet.config import FleetConfig, Role
    from edgekit.fleet.server import FleetServer
    from edgekit.loopback import is_loopback

    if role not in get_args(Role):
        hint = f"Choose from {', '.join(get_args(Role))}."
        raise UsageError("config.role", f"--role {role}: a fleet server has no such role.", hint=hint)
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not is_loopback(host) and not (allow_remote and (token or oidc or _has_users(database))):
        raise _open_to_all(host)
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
        role=cast("Role", role),
        allowed_hosts=tuple(allow_host),
        repository=repository,
        repository_root=repository_root,
        cert_file=cert_file,
        key_file=key_file,
        rules=rules,
        public_url=public_url,
        watch_grace_s=parse_duration(watch_grace, "--watch-grace"),
        is_private_webhook_allowed=allow_private_webhooks,
        authority=authority,
        broker_dir=broker_dir,
        device_broker=device_broker,
        device_repository=device_repository,
        tls_cert=tls_cert,
        tls_key=tls_key,
        client_ca=client_ca,
        crl=crl,
        oidc=oidc,
    )
    if bool(repository) != bool(repository_root):
        raise UsageError(
            "config.repository",
            "--repository and --repository-root go together.",
            hint="Give the repository's URL and a copy of its metadata/1.root.json.",
        )
    server = FleetServer(config, is_plain_allowed=allow_insecure, sign_desired=_make_signer(fleet_keys))

    def ready() -> None:
        note(f"dashboard  {paint(server.url, 'bold')}")
        note(f"API        {server.url}/api/v1/openapi.json")
        note(f"broker     {server.address}{' (embedded)' if server.embedded else ''}")
        note("Ctrl-C ends it.", "dim")

    server.run(ready)


def _open_to_all(host: str) -> UsageError:
    return UsageError(
        "config.insecure",
        f"--host {host}: everyone on the network could see the fleet.",
        hint=f"Make a user (edgekit fleet user add NAME) or set a token in {TOKEN_VARIABLE}, and give --allow-remote, "
        "with TLS; or keep 127.0.0.1.",
    )


def _has_users(database: str) -> bool:
    """Whether somebody can log in by name."""
    from edgekit.fleet.access.accounts import Accounts
    from edgekit.fleet.store import Store

    if "://" not in database and not Path(database).is_file():
        return False
    store = Store(database)
    try:
        return Accounts(store).has_any()
    finally:
        store.close()


def _make_signer(keys: Sequence[Path]) -> SignDesired | None:
    """What signs desired states; the server gets the deed, not the key."""
    if not keys:
        return None
    from edgekit.trust.desired_signer import sign_desired
    from edgekit.trust.signer import load_signer

    signers = [load_signer(key) for key in keys]
    return lambda state: sign_desired(state, signers)


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
