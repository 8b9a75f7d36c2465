"""``edgekit fleet``: who belongs to it: authority, claims, identities, revocation, the broker's configuration."""

from __future__ import annotations

import sys
import urllib.parse
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgekit.cli.console import note, out, out_json, table, warn
from edgekit.cli.fleet_http import DEFAULT_URL, get_json, send_json
from edgekit.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from edgekit.fleet.identity.authority import AuthorityFile

ca_app = typer.Typer(
    help="The fleet's certificate authority: make it, issue certificates for servers, see when what ends.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
FOLDER = typer.Argument(..., metavar="DIR", help="The authority's folder.")
URL = typer.Option(DEFAULT_URL, "--url", help="The fleet server.")
JSON = typer.Option(False, "--json", help="Print the records as JSON.")
WARN_DAYS = 30
_UNITS = {"min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_PAGE = 1000


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(ca_app, name="ca")
    for command in (claim, claims, identities, revoke, broker_config, broker_sync):
        app.command()(command)


def parse_span(text: str, option: str) -> float:
    """Seconds of ``30min``, ``8h``, ``2d`` or ``1w``.

    >>> parse_span("1d", "--for")
    86400.0
    """
    unit = text.lstrip("0123456789.")
    try:
        return float(text[: len(text) - len(unit)]) * _UNITS[unit]
    except (ValueError, KeyError):
        hint = "For example 30min, 8h, 2d or 1w."
        raise UsageError("config.invalid", f"{option} {text}: not a length of time.", hint=hint) from None


def _site_and_device(text: str) -> tuple[str, str]:
    site, separator, device = text.partition("/")
    if not separator or not site or not device or "/" in device:
        raise UsageError("telemetry.name", f"{text}: expected SITE/DEVICE.", hint="For example lab/cam-7.")
    return site, device


def _pairs(given: list[str]) -> dict[str, str]:
    labels = {}
    for pair in given:
        name, separator, value = pair.partition("=")
        if not separator:
            raise UsageError("config.invalid", f"--label {pair}: expected NAME=VALUE.")
        labels[name] = value
    return labels


# --- the authority


@ca_app.command()
def init(
    folder: Path = FOLDER,
    name: str = typer.Option("edgekit fleet", "--name", help="The fleet's name, which stands in its certificates."),
    lifetime: str = typer.Option("30d", "--lifetime", metavar="TIME", help="How long a device's certificate holds."),
    grace: str = typer.Option("60d", "--grace", metavar="TIME", help="For how long after its end it may still be renewed."),
    domain: list[str] = typer.Option(
        [], "--domain", metavar="NAME|NET", help="Vouch for servers in this domain or network only; repeatable."
    ),
    server: list[str] = typer.Option(
        [], "--server", metavar="NAME", help="A server that may use every topic of the broker.  [default: edgekit-fleet]"
    ),
) -> None:
    """Make the fleet's two authorities: one for its servers, one for its devices."""
    from edgekit.fleet.identity.authority import init_authority

    made = init_authority(
        folder,
        name=name,
        now=datetime.now(UTC).replace(microsecond=0),
        certificate_days=parse_span(lifetime, "--lifetime") / 86400,
        grace_days=parse_span(grace, "--grace") / 86400,
        domains=domain,
        servers=server,
    )
    out(made.fingerprint)
    note(f"{folder}: the authority; above is the fingerprint that devices are given")
    note(f"next: edgekit fleet ca issue {folder} broker --host BROKER; the same for the fleet server and the repository")
    note(f"the fleet server needs the folder without ca.key: keep {folder / 'ca.key'} off line once the servers have theirs")


@ca_app.command()
def issue(
    folder: Path = FOLDER,
    name: str = typer.Argument(..., metavar="NAME", help="Common name: how the broker knows it as a client."),
    host: list[str] = typer.Option([], "--host", metavar="NAME|IP", help="Where it serves; repeatable."),
    is_client: bool = typer.Option(False, "--client", help="It logs in to the broker or the repository."),
    days: float = typer.Option(365.0, "--days", help="How long the certificate holds."),
    target: Path | None = typer.Option(None, "--out", metavar="DIR", help="Where to write it.  [default: DIR/issued]"),
) -> None:
    """Make a certificate and a key for a server of the fleet; needs ca.key."""
    from edgekit.fleet.identity.authority import Authority

    now = datetime.now(UTC).replace(microsecond=0)
    pem, key = Authority.open(folder).issue_server(name, hosts=host, is_client=is_client, days=days, now=now, out=target)
    out(f"{pem}\n{key}")


@ca_app.command()
def status(folder: Path = FOLDER, json: bool = JSON) -> None:
    """Show the certificates of the folder. Exit 1 when one ends within 30 days."""
    from edgekit.fleet.identity.authority import Authority

    authority = Authority.open(folder)
    files, now = authority.files(), datetime.now(UTC)
    if json:
        out_json(files)
    else:
        rows = [[each.file, each.subject, f"{each.not_after:%Y-%m-%d}", _what(each), each.fingerprint] for each in files]
        out(table(["file", "subject", "ends", "key", "fingerprint"], rows))
        days = authority.settings.certificate_days
        note(f"devices: certificates for {days:g} days, renewed up to {authority.settings.grace_days:g} days late")
    ending = [each for each in files if each.not_after < now + timedelta(days=WARN_DAYS)]
    for each in ending:
        warn(f"{each.file} ends on {each.not_after:%Y-%m-%d}: make a new one")
    raise typer.Exit(1 if ending else 0)


def _what(file: AuthorityFile) -> str:
    return "here" if file.has_key else "not here"


# --- claims


def claim(
    device: str = typer.Argument(..., metavar="SITE/DEVICE", help="For whom."),
    label: list[str] = typer.Option([], "--label", metavar="NAME=VALUE", help="A label that the device gets; repeatable."),
    length: str = typer.Option("1d", "--for", metavar="TIME", help="How long it can be used: 30min, 8h, 1d."),
    fleet_url: str = typer.Option("", "--fleet", metavar="URL", help="The server as the device reaches it.  [default: --url]"),
    url: str = URL,
    json: bool = JSON,
) -> None:
    """Make a claim with which a device is enrolled, once. It is shown here and nowhere else."""
    site, name = _site_and_device(device)
    body = {"site": site, "device": name, "seconds": parse_span(length, "--for"), "labels": _pairs(label)}
    made = send_json(url, "/api/v1/claims", body)
    if json:
        out_json(made)
        return
    out(made["claim"])
    note(f"for {device}, once, until {made['expires_at'][:16].replace('T', ' ')} UTC; on the device:")
    note(f"  edgekit agent enroll {fleet_url or url} --claim {made['claim']} \\\n    --ca-fingerprint {made['fingerprint']}")


def claims(
    withdraw: str = typer.Option("", "--withdraw", metavar="ID", help="Make this claim worthless."),
    url: str = URL,
    json: bool = JSON,
) -> None:
    """List claims, or withdraw one."""
    if withdraw:
        send_json(url, f"/api/v1/claims/{urllib.parse.quote(withdraw, safe='')}", None, method="DELETE")
        note(f"{withdraw}: withdrawn")
        return
    found = get_json(url, "/api/v1/claims")
    if json:
        out_json(found)
        return
    rows = [
        [each["id"], f"{each['site']}/{each['device']}", each["state"], _day(each["expires_ms"]), each["created_by"]]
        for each in found
    ]
    out(table(["id", "device", "state", "until", "made by"], rows))


def _day(ms: int) -> str:
    return f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M}"


# --- identities


def identities(
    state: str = typer.Option("", "--state", help="Only valid, due, expired or revoked ones."),
    search: str = typer.Option("", "--search", help="Part of site or device."),
    url: str = URL,
    json: bool = JSON,
) -> None:
    """List devices with their certificates and when those end."""
    if state not in {"", "valid", "due", "expired", "revoked"}:
        hint = "Choose valid, due, expired or revoked."
        raise UsageError("identity.state", f"--state {state}: no such state.", hint=hint)
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        query = urllib.parse.urlencode({"state": state, "search": search, "after": after, "limit": _PAGE})
        page = get_json(url, f"/api/v1/identities?{query}")
        found += page["identities"]
        after = page["next"]
        if not after:
            break
    if json:
        out_json(found)
        return
    rows = [
        [f"{each['site']}/{each['device']}", each["state"], _day(each["not_after_ms"]), each["serial"][:16], each["reason"]]
        for each in found
    ]
    out(table(["device", "state", "ends", "serial", "reason"], rows))
    if not rows:
        note("No such device. Enrol one: edgekit fleet claim SITE/DEVICE", "dim")


def revoke(
    device: str = typer.Argument(..., metavar="SITE/DEVICE", help="Whom."),
    reason: str = typer.Option(..., "--reason", help="Why; it stands in the audit log."),
    url: str = URL,
) -> None:
    """Shut a device out: its certificates are revoked and it gets no others, until somebody makes a claim for it."""
    site, name = _site_and_device(device)
    made = send_json(url, f"/api/v1/identities/{site}/{name}/revoke", {"reason": reason})
    out(f"{device}: revoked, {made['certificates']} certificate(s)")
    note("the broker and the repository refuse it once they have the new list: within a minute, where they read it")


# --- the broker


def broker_config(
    target: Path = typer.Option(..., "--out", metavar="DIR", help="Where to write it."),
    authority: Path = typer.Option(..., "--authority", metavar="DIR", help='The folder of "edgekit fleet ca init".'),
    host: list[str] = typer.Option(
        [], "--host", metavar="NAME|IP", help="Where devices reach it: issues its certificate (needs ca.key); repeatable."
    ),
    port: int = typer.Option(8883, "--port", min=1, max=65535, help="For devices."),
    server_port: int = typer.Option(8884, "--server-port", min=1, max=65535, help="For the fleet's servers."),
    address: str = typer.Option("", "--address", help="Where it listens.  [default: all of the machine's addresses]"),
    folder: str = typer.Option(
        "", "--folder", metavar="PATH", help="What DIR is called where the broker runs.  [default: DIR]"
    ),
    data: str = typer.Option("/var/lib/mosquitto", "--data", metavar="PATH", help="The broker's own folder, there."),
    user: str = typer.Option("", "--user", help="Whom Mosquitto becomes when root starts it."),
) -> None:
    """Write Mosquitto's configuration, its access rules, authorities and revocation list.

    Give DIR to "edgekit fleet serve" as --broker-dir too: it keeps rules and revocations up to date there. Mosquitto reads
    them again at SIGHUP.
    """
    from edgekit.durable import make_folder, write_durably
    from edgekit.fleet.identity.authority import Authority
    from edgekit.fleet.identity.mosquitto import LOCAL_RULES, BrokerSettings, make_acl, make_config

    found = Authority.open(authority)
    now = datetime.now(UTC).replace(microsecond=0)
    settings = BrokerSettings(
        folder=folder or str(target.absolute()),
        data=data,
        address=address,
        device_port=port,
        server_port=server_port,
        user=user,
    )
    files = {
        "mosquitto.conf": make_config(settings),
        "ca.pem": found.servers_pem,
        "devices.pem": (authority / "devices.pem").read_text(),
    }
    own = target / LOCAL_RULES
    more = own.read_text(encoding="utf-8") if own.is_file() else ""
    fresh = {"acl": make_acl(found.settings.servers, more=more), "crl.pem": found.make_crl((), now).decode()}
    files |= {name: text for name, text in fresh.items() if not (target / name).exists()}  # a fleet server may keep them
    try:
        make_folder(target)
        for name, text in files.items():
            write_durably(target / name, text.encode(), mode=0o644)
        if host:
            found.issue_server("broker", hosts=host, is_client=False, days=365, now=now, out=target)
    except OSError as error:
        raise EnvironmentFault("output.unwritable", f"{target}: cannot be written: {error.strerror}.") from error
    sys.stdout.write(f"{target / 'mosquitto.conf'}\n")
    if not (target / "broker.pem").exists():
        note(f"still missing: {target / 'broker.pem'} and broker.key; give --host, or put them there")
    note("the user that Mosquitto runs as must be able to read broker.key, and to write its own folder")


def broker_sync(
    target: Path = typer.Option(..., "--out", metavar="DIR", help='The folder of "edgekit fleet broker-config".'),
    url: str = URL,
    every: str = typer.Option("", "--every", metavar="TIME", help="Go on, at this pace, until Ctrl-C.  [default: once]"),
) -> None:
    """Fetch access rules and revocation lists from the fleet server, for a broker on another machine.

    A file is replaced only when its content changed; what lies there stays while the server is away.
    """
    import time

    pause = parse_span(every, "--every") if every else 0.0
    try:
        while True:
            try:
                changed = _sync(target, url)
            except EnvironmentFault as error:
                if not pause:
                    raise
                warn(f"{error.message} The files stay as they are.")
            else:
                note(f"{target}: {', '.join(changed) or 'nothing'} changed")
            if not pause:
                return
            time.sleep(pause)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _sync(target: Path, url: str) -> list[str]:
    """The names of the files that changed."""
    from edgekit.durable import write_durably

    changed, told = [], get_json(url, "/api/v1/broker-files")
    for name, fresh in (("crl.pem", str(told["crl"])), ("acl", str(told["acl"]))):
        file = target / name
        try:
            if name == "crl.pem" and file.exists() and _is_same_list(file.read_text(), fresh):
                continue
            if not file.exists() or file.read_text() != fresh:
                write_durably(file, fresh.encode(), mode=0o644)
                changed.append(name)
        except OSError as error:
            raise EnvironmentFault("output.unwritable", f"{file}: cannot be written: {error.strerror}.") from error
    return changed


def _is_same_list(old: str, new: str) -> bool:
    """Whether two revocation lists name the same certificates, and the old one still holds for long enough."""
    from edgekit.fleet.identity.authority import read_crls

    try:
        before, after = read_crls(old), read_crls(new)
    except ValueError:
        return False
    is_fresh = all(each.issued > datetime.now(UTC) - timedelta(days=2) for each in before[:1])
    return is_fresh and [each.serials for each in before] == [each.serials for each in after]
