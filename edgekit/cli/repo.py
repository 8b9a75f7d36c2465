"""``edgekit repo``: create an update repository, trust publishers, publish, look, refresh, serve.

What happens to releases afterwards is in :mod:`edgekit.cli.repo_release`.
"""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgekit.cli import repo_release, repo_stick
from edgekit.cli.console import format_bytes, note, out, out_json, paint, table, warn
from edgekit.cli.moment import parse_moment
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.repository.ceremony import RepositoryStatus
    from edgekit.schema.release import Release

app = typer.Typer(
    help="The update repository: publish and serve releases; promote, recall, trace and prune them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
FOLDER = typer.Argument(..., metavar="DIR", help="The repository.")
JSON = typer.Option(False, "--json", help="Print the record as JSON.")


@app.command()
def init(
    folder: Path = FOLDER,
    keys: Path | None = typer.Option(None, "--keys", metavar="KEYS", help="For the private keys. Default: DIR/../keys."),
    json: bool = JSON,
) -> None:
    """Create a repository with its keys (root, targets, snapshot, timestamp)."""
    from edgekit.repository.ceremony import init_repository

    status = init_repository(folder, keys_dir=keys)
    if json:
        out_json(status)
        return
    out(f"{folder}: repository; give {folder / 'metadata' / '1.root.json'} to each device")
    note(f"private keys are in {status.keys_dir}: keep root.pem off this machine once the repository is set up")


@app.command()
def trust(folder: Path = FOLDER, key: Path = typer.Argument(..., metavar="PUBKEY", help="A publisher's public key.")) -> None:
    """Trust a publisher: its bundles may be published here."""
    from edgekit.repository.publishing import add_publisher

    out(add_publisher(folder, key).keyid)


@app.command()
def publish(
    folder: Path = FOLDER,
    bundle: Path = typer.Argument(..., metavar="BUNDLE", help="The .edgekit file."),
    channel: str = typer.Option("production", "--channel", help="Where devices look for it."),
    key: list[Path] = typer.Option([], "--key", metavar="PUB", help="Trust this publisher for this once."),
    again: bool = typer.Option(False, "--again", help="Publish an old release again, as the newest: rolls devices back."),
    notes: str = typer.Option("", "--notes", help="For people."),
    valid_until: str = typer.Option("", "--valid-until", metavar="DATE", help="2027-06-30, with a time, or +90d; UTC."),
    fallback: str = typer.Option("report", "--fallback", help="What devices do from then on: previous, abstain or report."),
    contract_change: bool = typer.Option(
        False, "--contract-change", help="Clients are ready for other inputs, outputs or labels; devices refuse that else."
    ),
    no_delta: bool = typer.Option(False, "--no-delta", help="Make no deltas from the channel's newest releases."),
    role_key: list[str] = repo_release.ROLE_KEYS,
    json: bool = JSON,
) -> None:
    """Verify a bundle and make it a release. Exit 4: the bundle was refused; 1: the release still waits for signatures."""
    from edgekit.repository.deltas import make_deltas
    from edgekit.repository.publishing import publish as publish_bundle
    from edgekit.trust.keys import load_public_key

    now = datetime.now(UTC)
    until = parse_moment(valid_until, flag="--valid-until", now=now) if valid_until else None
    if until is not None and until <= now:
        raise UsageError("repository.valid_until", f"--valid-until {valid_until}: is over.", hint="Give a time to come.")
    release = publish_bundle(
        folder,
        bundle,
        channel=channel,
        keys=[load_public_key(path) for path in key],
        is_again=again,
        notes=notes,
        allows_contract_change=contract_change,
        valid_until=until,
        fallback=repo_release.parse_fallback(fallback),
        delta_maker=None if no_delta else make_deltas,
        role_keys=role_key,
    )
    repo_release.announce(folder, release, json=json)


@app.command()
def status(folder: Path = FOLDER, json: bool = JSON) -> None:
    """Show releases, channels, and when each role's signature expires."""
    from edgekit.repository.ceremony import repository_status

    found = repository_status(folder)
    if json:
        out_json(found)
        return
    _show(found)


def _show(found: RepositoryStatus) -> None:
    now = datetime.now(UTC)
    recalled = {recall.digest for recall in found.recalls}
    rows = [_release_row(release, now, recalled) for release in found.releases]
    headers = ["model", "version", "channel", "counter", "published (UTC)", "size", "replaces", "valid until (UTC)"]
    out(table(headers, rows, right=[3, 5]))
    if not rows:
        out("(no release yet)")
    for recall in found.recalls:
        text = (
            f"recalled {recall.digest[:19]}… from {recall.deadline:%Y-%m-%d %H:%M} UTC on ({recall.fallback}): {recall.reason}"
        )
        out(paint(text, "yellow"))
    out()
    rows = [
        [
            role.role,
            str(role.version),
            _expiry(role.expires_at, is_expired=role.is_expired),
            f"{role.threshold} of {', '.join(keyid[:12] for keyid in role.keyids)}",
        ]
        for role in found.roles
    ]
    out(table(["role", "version", "expires (UTC)", "keys"], rows, right=[1]))
    publishers = ", ".join(f"{keyid[:12]}…" for keyid in found.publishers)
    out(f"\npublishers: {publishers or 'none; add one with edgekit repo trust'}")
    if found.waiting:
        from edgekit.cli.trust import print_waiting

        print_waiting(Path(found.folder), found.waiting)
    if any(role.is_expired for role in found.roles):
        warn(f'devices refuse this repository until it is signed again: "edgekit repo refresh {found.folder}"')


def _release_row(release: Release, now: datetime, recalled: set[str]) -> list[str]:
    info = release.info
    until = "" if info.valid_until is None else f"{info.valid_until:%Y-%m-%d %H:%M}, then {info.fallback}"
    if info.valid_until is not None and info.valid_until <= now:
        until = paint(f"{until} (over)", "red")
    if release.manifest_digest in recalled:
        until = paint("recalled", "red")
    return [
        info.name,
        info.version,
        info.channel,
        str(info.counter),
        f"{info.published_at:%Y-%m-%d %H:%M}",
        format_bytes(info.installed_bytes),
        info.parent.partition("@")[2],
        until,
    ]


def _expiry(moment: datetime, *, is_expired: bool) -> str:
    left = moment - datetime.now(UTC)
    text = f"{moment:%Y-%m-%d %H:%M}"
    if is_expired:
        return paint(f"{text} (expired)", "red")
    return f"{text} (in {left.days} d {left.seconds // 3600} h)"


@app.command()
def refresh(
    folder: Path = FOLDER,
    targets: bool = typer.Option(False, "--targets", help="Sign the targets again, too."),
    json: bool = JSON,
) -> None:
    """Sign timestamp and snapshot again; run it daily, so that devices go on to trust the repository."""
    from edgekit.repository.ceremony import refresh_repository

    found = refresh_repository(folder, is_targets_too=targets)
    if json:
        out_json(found)
        return
    for role in found.roles:
        out(f"{role.role.ljust(9)}  version {role.version}, expires {_expiry(role.expires_at, is_expired=role.is_expired)}")


@app.command()
def check(folder: Path = FOLDER) -> None:
    """Compare every manifest and blob with its digest. Exit 1: something is missing or damaged."""
    from edgekit.repository.publishing import check_repository

    faults = check_repository(folder)
    for fault in faults:
        out(fault)
    if faults:
        note('publish the bundles again, with "--again", to repair them')
        raise typer.Exit(1)
    out(f"{folder}: every release is complete")


@app.command()
def serve(
    folder: Path = FOLDER,
    host: str = typer.Option("127.0.0.1", "--host", help="An address of this machine."),
    port: int = typer.Option(8600, "--port", min=0, max=65535, help="0 takes a free one."),
    cert: Path | None = typer.Option(None, "--tls-cert", "--cert", metavar="FILE", help="TLS certificate chain, PEM."),
    key: Path | None = typer.Option(None, "--tls-key", "--key", metavar="FILE", help="TLS private key, PEM."),
    client_ca: Path | None = typer.Option(
        None, "--client-ca", metavar="FILE", help="With TLS: serve only clients with a certificate of these authorities."
    ),
    crl: Path | None = typer.Option(None, "--crl", metavar="FILE", help="And none that these revocation lists name."),
) -> None:
    """Serve a repository over HTTP, with Range. Only metadata, targets and blobs are served.

    Certificates, authorities and revocation lists are read again when their files change.
    """
    from edgekit.loopback import is_loopback
    from edgekit.repository.server import serve_repository

    if not is_loopback(host) and cert is None:
        warn("serving other machines without TLS: put TLS termination in front, or give --tls-cert and --tls-key")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        serve_repository(
            folder,
            host,
            port,
            cert=cert,
            key=key,
            client_ca=client_ca,
            crl=crl,
            on_ready=lambda url: note(f"{folder}: serving at {url}"),
        )
    except KeyboardInterrupt:
        note("stopped")


repo_release.register(app)


app.command()(repo_stick.stick)
