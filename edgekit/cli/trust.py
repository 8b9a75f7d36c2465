"""``edgekit trust``: who may sign what in a repository, what waits for signatures, what expires."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import note, out, out_json, paint, table, warn
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.repository.ceremony import Fault, RepositoryStatus, RoleStatus
    from edgekit.repository.changes import Settled, Waiting
    from edgekit.repository.store import Expiry

app = typer.Typer(
    help="""Who may sign what: init, status, sign, rotate, revoke, delegate, refresh, doctor.

    A key is a .pub or .pem file, or the URI of a token or key service (hsm:2, awskms:ARN, gcpkms:PATH, azurekms:ID, hv:NAME).
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
FOLDER = typer.Argument(..., metavar="DIR", help="The repository.")
JSON = typer.Option(False, "--json", help="Print the record as JSON.")
KEYS = typer.Option([], "--key", metavar="KEY", help="Sign with this private key, too: .pem or URI; several times.")


@app.command()
def init(
    folder: Path = FOLDER,
    keys: Path | None = typer.Option(None, "--keys", metavar="KEYS", help="For the private keys. Default: DIR/../keys."),
    root_keys: int = typer.Option(3, "--root-keys", min=1, max=16, help="Keys of the root role."),
    threshold: int = typer.Option(2, "--threshold", min=1, max=16, help="Root keys that must sign together."),
    targets_keys: int = typer.Option(1, "--targets-keys", min=1, max=16, help="Keys that sign releases."),
    targets_threshold: int = typer.Option(1, "--targets-threshold", min=1, max=16, help="Of them that must sign together."),
    root_key: list[str] = typer.Option([], "--root-key", metavar="KEY", help="A root key that exists; counts as one of them."),
    targets_key: list[str] = typer.Option([], "--targets-key", metavar="KEY", help="The same for releases."),
    expire: list[str] = typer.Option([], "--expire", metavar="ROLE=DAYS", help="For example timestamp=2."),
    is_gated: bool = typer.Option(
        False, "--gated", help="Releases enter on dev and are promoted to staging and production through gates."
    ),
    json: bool = JSON,
) -> None:
    """Create a repository whose keys are apart, with thresholds. EDGEKIT_KEY_PASSPHRASE encrypts new keys."""
    from edgekit.repository.ceremony import KeyPlan, init_repository
    from edgekit.trust.signer import PASSPHRASE_VARIABLE

    plan = KeyPlan(
        root=max(root_keys, len(root_key)),
        root_threshold=threshold,
        targets=max(targets_keys, len(targets_key)),
        targets_threshold=targets_threshold,
        given={"root": tuple(root_key), "targets": tuple(targets_key)},
    )
    found = init_repository(folder, keys_dir=keys, keys=plan, expiry=_expiry(expire), is_gated=is_gated)
    if json:
        out_json(found)
        return
    _print_roles(found)
    out(f"\n{folder}: repository; give {folder / 'metadata' / '1.root.json'} to each device")
    note(f"private keys are in {found.keys_dir}: move root-*.pem to separate, offline places; snapshot and timestamp stay here")
    import os

    if not os.environ.get(PASSPHRASE_VARIABLE):
        warn(f"the private keys are not encrypted; set {PASSPHRASE_VARIABLE} before, to have them encrypted")


def _expiry(texts: list[str]) -> Expiry:
    import msgspec

    from edgekit.repository.store import Expiry

    days: dict[str, float] = {}
    for text in texts:
        role, _, number = text.partition("=")
        try:
            days[role] = float(number)
        except ValueError:
            days = {"": 0.0}
        if role not in Expiry.__struct_fields__ or not 0 < days.get(role, 0) < 10_000:
            raise UsageError("trust.expire", f"--expire {text}: expected ROLE=DAYS.", hint="For example --expire root=730.")
    return msgspec.convert(days, Expiry)


@app.command()
def status(folder: Path = FOLDER, json: bool = JSON) -> None:
    """Show every role: its keys, its threshold, what expires when, and what waits for whose signature."""
    from edgekit.repository.ceremony import repository_status

    found = repository_status(folder)
    if json:
        out_json(found)
        return
    _print_roles(found)
    print_waiting(folder, found.waiting)


def _print_roles(found: RepositoryStatus) -> None:
    rows = [
        [role.role, str(role.version), _when(role), f"{role.threshold} of {len(role.keyids)}", _keys(role)]
        for role in found.roles
    ]
    out(table(["role", "version", "expires (UTC)", "threshold", "keys"], rows, right=[1]))
    for role in found.roles:
        if role.paths:
            models = ", ".join(path.split("/")[1] for path in role.paths)
            out(f"{role.role} signs releases of {models}")


def _keys(role: RoleStatus) -> str:
    names = role.names or ("",) * len(role.keyids)
    return ", ".join(f"{name} {keyid[:8]}".strip() for name, keyid in zip(names, role.keyids, strict=True))


def _when(role: RoleStatus) -> str:
    left = role.expires_at - datetime.now(UTC)
    text = f"{role.expires_at:%Y-%m-%d %H:%M}"
    if role.is_expired:
        return paint(f"{text} (expired)", "red")
    return f"{text} (in {left.days} d {left.seconds // 3600} h)"


def print_waiting(folder: Path, waiting: tuple[Waiting, ...]) -> None:
    """Show the changes that are not published yet, who signed them, and who still may."""
    from edgekit.repository.store import Store

    store = Store.open(folder)
    for item in waiting:
        signed = ", ".join(store.name_of(keyid) for keyid in item.signed) or "nobody"
        may = ", ".join(store.name_of(keyid) for keyid in item.unsigned) or "nobody else"
        out()
        out(paint(f"{item.role} version {item.version} is not published yet: {item.reason}", "yellow"))
        out(f"  signed by {signed}; may sign: {may}")
        if item.missing:
            out(f"  edgekit trust sign {folder} {item.role} --key KEY.pem")
            out(f"  elsewhere: edgekit trust export {folder} {item.role} --out FILE, sign FILE there, then edgekit trust merge")


def _say(folder: Path, done: Settled, what: str) -> None:
    """What became of a change. Exit 1: it still waits."""
    out(f"{what}: published" if not done.waiting else f"{what}: waits for signatures")
    print_waiting(folder, done.waiting)
    if done.waiting:
        raise typer.Exit(1)


@app.command()
def sign(
    place: Path = typer.Argument(..., metavar="DIR|FILE", help="The repository, or a file that trust export made."),
    role: str = typer.Argument("", help="Of a repository's pending changes; default: all that the keys may sign."),
    key: list[str] = KEYS,
    is_sure: bool = typer.Option(False, "--yes", "-y", help="Do not ask."),
) -> None:
    """Look at a change and sign it. Exit 1: it still waits for others."""
    from edgekit.repository.ceremony import describe_change, read_detached, sign_detached, sign_pending
    from edgekit.repository.store import Store

    if place.is_file():
        for line in describe_change(read_detached(place).signed, None):
            out(line)
        _confirm(is_sure)
        keyids = sign_detached(place, key)
        out(f"{place}: signed by {', '.join(keyid[:12] for keyid in keyids)}")
        note(f"take it back, then: edgekit trust merge DIR {place.name}")
        return
    store = Store.open(place)
    chain = store.chain()
    for name, metadata in store.pending().items():
        if role in {"", name}:
            old = chain.root if name == "root" else chain.targets if name == "targets" else chain.delegated.get(name)
            for line in describe_change(metadata.signed, old):
                out(f"{name}: {line}")
    _confirm(is_sure)
    roles, done = sign_pending(place, role, keys=key)
    _say(place, done, ", ".join(roles))


def _confirm(is_sure: bool) -> None:
    import sys

    if is_sure or not sys.stdin.isatty():
        return
    if not typer.confirm("Sign this?", default=False, err=True):
        raise typer.Exit(1)


@app.command()
def export(
    folder: Path = FOLDER,
    role: str = typer.Argument(..., help="Whose change."),
    destination: Path = typer.Option(..., "--out", metavar="FILE", help="To carry to who signs."),
) -> None:
    """Write a change that waits for signatures to a file, to be signed on another machine."""
    from edgekit.repository.ceremony import export_pending

    for line in export_pending(folder, role, destination):
        out(line)
    note(f"{destination}: sign it there with edgekit trust sign {destination.name} --key KEY, then edgekit trust merge here")


@app.command()
def merge(folder: Path = FOLDER, file: Path = typer.Argument(..., metavar="FILE", help="Signed elsewhere.")) -> None:
    """Take over the signatures of a file that was signed elsewhere. Exit 1: more are needed."""
    from edgekit.repository.ceremony import merge_detached

    role, done = merge_detached(folder, file)
    _say(folder, done, role)


@app.command()
def rotate(
    folder: Path = FOLDER,
    role: str = typer.Argument(..., help="root, targets, snapshot, timestamp or a delegated role."),
    old: str = typer.Option("", "--old", metavar="KEY", help="Remove this key: its name, its id or its file."),
    new: str = typer.Option("", "--new", metavar="KEY", help="Add this key; generate makes one in the keys folder."),
    threshold: int | None = typer.Option(None, "--threshold", min=1, max=16, help="Signatures that the role needs."),
    key: list[str] = KEYS,
) -> None:
    """Exchange a key of a role, add or remove one, or change the threshold. Exit 1: the change waits for signatures."""
    from edgekit.repository.ceremony import rotate as rotate_key

    _say(folder, rotate_key(folder, role, old=old, new=new, threshold=threshold, keys=key), role)


@app.command()
def revoke(
    folder: Path = FOLDER,
    spec: str = typer.Argument(..., metavar="KEY", help="Its name, its id or its file."),
    reason: str = typer.Option(..., "--reason", help="For the audit log."),
    key: list[str] = KEYS,
) -> None:
    """Take a lost or stolen key out of every role. Exit 1: the change waits for signatures."""
    from edgekit.repository.ceremony import revoke as revoke_key

    _say(folder, revoke_key(folder, spec, reason=reason, keys=key), f"revocation of {spec}")


@app.command()
def delegate(
    folder: Path = FOLDER,
    role: str = typer.Argument(..., help="The role's name, for example models-audio."),
    models: list[str] = typer.Option([], "--models", metavar="NAME", help="Models that it signs; * stands for any part."),
    new_key: list[str] = typer.Option(["generate"], "--new-key", metavar="KEY", help="Its keys; generate makes one."),
    threshold: int = typer.Option(1, "--threshold", min=1, max=16, help="Signatures that it needs."),
    is_removed: bool = typer.Option(False, "--remove", help="Take the delegation back."),
    key: list[str] = KEYS,
) -> None:
    """Let other keys sign the releases of a family of models, and of no other. Exit 1: it waits for signatures."""
    from edgekit.repository.ceremony import delegate as add
    from edgekit.repository.ceremony import undelegate

    if is_removed:
        _say(folder, undelegate(folder, role, keys=key), role)
        return
    _say(folder, add(folder, role, models=models, new_keys=new_key, threshold=threshold, keys=key), role)


@app.command()
def refresh(
    folder: Path = FOLDER,
    role: list[str] = typer.Option([], "--role", help="Give this role a new expiry, too: root, targets or a delegated one."),
    key: list[str] = KEYS,
    json: bool = JSON,
) -> None:
    """Sign timestamp and snapshot again and publish what has its signatures. Run it daily, from "edgekit trust timer"."""
    from edgekit.repository.ceremony import refresh_repository

    found = refresh_repository(folder, roles=role, keys=key)
    if json:
        out_json(found)
        return
    _print_roles(found)
    print_waiting(folder, found.waiting)
    if found.waiting and role:
        raise typer.Exit(1)


@app.command()
def timer(
    folder: Path = FOLDER,
    destination: Path | None = typer.Option(None, "--out", metavar="DIR", help="Write the units there; default: print them."),
    user: str = typer.Option("", "--user", help="Who runs it; default: whoever owns the repository's folder."),
) -> None:
    """Make the systemd units that run trust refresh twice a day, and trust doctor with it."""
    from edgekit.repository.timer import refresh_units

    for name, text in refresh_units(folder, user=user).items():
        if destination is None:
            out(f"# {name}\n{text}")
            continue
        destination.mkdir(parents=True, exist_ok=True)
        (destination / name).write_text(text)
        out(str(destination / name))
    if destination is not None:
        note("systemctl daemon-reload && systemctl enable --now edgekit-refresh.timer")


@app.command()
def doctor(
    folder: Path = FOLDER,
    days: float = typer.Option(14.0, "--days", min=0, help="What expires within them is a fault."),
    json: bool = JSON,
) -> None:
    """Find what is wrong with the keys, or will be soon. Exit 1: something is."""
    from edgekit.repository.ceremony import diagnose

    found = diagnose(folder, days=days)
    if json:
        out_json(found)
    else:
        _print_faults(folder, found)
    if any(fault.level == "fault" for fault in found):
        raise typer.Exit(1)


def _print_faults(folder: Path, found: tuple[Fault, ...]) -> None:
    for fault in found:
        out(f"{paint(fault.level.ljust(7), 'red' if fault.level == 'fault' else 'yellow')}  {fault.what}")
        if fault.hint:
            out(f"         {fault.hint}")
    if not found:
        out(f"{folder}: nothing found")
