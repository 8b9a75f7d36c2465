"""``edgekit agent enroll``: how a device becomes one of the fleet. Registered by :mod:`edgekit.cli.agent`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from edgekit.cli.console import note, out, out_json
from edgekit.errors import EnvironmentFault, UsageError

CLAIM_VARIABLE = "EDGEKIT_CLAIM"
MAX_CA_BYTES = 1 << 20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(enroll)


def enroll(
    url: str = typer.Argument(..., metavar="URL", help="The fleet server, https://host:port."),
    claim: str = typer.Option("", "--claim", metavar="CLAIM", help=f"- reads it from stdin.  [default: {CLAIM_VARIABLE}]"),
    fingerprint: str = typer.Option("", "--ca-fingerprint", metavar="SHA256", help="Of the fleet's authority, as the claim's."),
    ca_file: Path | None = typer.Option(
        None, "--ca", metavar="FILE", help="The fleet's authority, instead.  [default: the system's authorities]"
    ),
    config: Path | None = typer.Option(None, "--config", metavar="FILE", help="The agent's settings."),
    state_dir: Path | None = typer.Option(None, "--state-dir", help="The agent's state folder."),
    json: bool = typer.Option(False, "--json", help="Print the record as JSON."),
) -> None:
    """Get this device's certificate with a claim of "edgekit fleet claim". The key is made here and stays here.

    The agent then logs in with it at the broker and the repository, and renews it by itself. Exit 4: the claim or the server's
    certificate was refused.
    """
    from edgekit.agent.enrolment import enrol, find_server
    from edgekit.agent.identity import IdentityFiles
    from edgekit.agent.state_store import prepare_dir

    word = _claim(claim)
    settings_dir, site, device = _told(config, state_dir)
    server = find_server(url, fingerprint=fingerprint, authorities=_authorities(ca_file))
    prepare_dir(settings_dir)
    files = IdentityFiles.of(settings_dir)
    try:
        about, certificate = enrol(server, claim=word, files=files, site=site, device=device)
        _hand_over(files.folder)
    except OSError as error:
        raise EnvironmentFault("state.unwritable", f"{files.folder}: {error.strerror}.", hint="Run this as root.") from error
    if json:
        out_json(about)
        return
    out(f"{about.site}/{about.device}")
    note(f"enrolled until {certificate.not_after:%Y-%m-%d %H:%M} UTC; key and certificate are in {files.folder}")
    for name, value in (("broker", about.broker), ("repository", about.repository)):
        if value:
            note(f"{name}  {value}")
    note("start the agent, or start it again: it uses and renews the certificate by itself")


def _claim(given: str) -> str:
    word = sys.stdin.readline() if given == "-" else given or os.environ.get(CLAIM_VARIABLE, "")
    if not word.strip():
        hint = f'Give --claim, or set {CLAIM_VARIABLE}; "edgekit fleet claim SITE/DEVICE" makes one.'
        raise UsageError("claim.missing", "no claim was given.", hint=hint)
    return word.strip()


def _authorities(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_CA_BYTES).decode("ascii", errors="replace")
    except OSError as error:
        raise UsageError("config.unreadable", f"--ca {file}: {error.strerror}.", hint="Give the fleet's ca.pem.") from error


def _told(config: Path | None, state_dir: Path | None) -> tuple[Path, str, str]:
    """The state folder, and the site and device that the settings name; what an older certificate says does not count."""
    import tomllib

    from edgekit.agent.config import ENV_FILE, ENV_PREFIX, default_state_dir

    file = config or (Path(os.environ[ENV_FILE]) if os.environ.get(ENV_FILE) else None)
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError) as error:
        raise UsageError("config.unreadable", f"{file}: cannot be read: {error}.") from error

    def setting(name: str) -> str:
        return os.environ.get(f"{ENV_PREFIX}{name.upper()}") or str(said.get(name, ""))

    folder = state_dir or Path(setting("state_dir") or default_state_dir())
    return folder.absolute(), setting("site"), setting("device")


def _hand_over(folder: Path) -> None:
    """Root made the files; the agent that owns the state folder must be able to use them."""
    owner = folder.parent.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        return
    for path in (folder, *folder.iterdir()):
        os.chown(path, owner.st_uid, owner.st_gid)
