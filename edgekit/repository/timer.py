"""The systemd units that keep a repository fresh: timestamps live for a day, so something must sign them again."""

from __future__ import annotations

import pwd
import sys
from pathlib import Path

_SERVICE = """\
[Unit]
Description=Sign the timestamp of {folder} again
After=network.target

[Service]
Type=oneshot
User={user}
ExecStart={python} -m edgekit trust refresh {folder}
ExecStartPost=-{python} -m edgekit trust doctor {folder}
# Keys with a passphrase: put EDGEKIT_KEY_PASSPHRASE=... into this file, mode 0600.
EnvironmentFile=-/etc/edgekit/refresh.env
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={folder} {keys}
PrivateTmp=yes
PrivateNetwork=yes
"""
_TIMER = """\
[Unit]
Description=Sign the timestamp of {folder} again, twice a day

[Timer]
OnCalendar=*-*-* 00,12:00:00
RandomizedDelaySec=30min
Persistent=yes

[Install]
WantedBy=timers.target
"""


def refresh_units(folder: Path, *, user: str = "") -> dict[str, str]:
    """The units by file name.

    Args:
        folder: of the repository.
        user: who runs it; empty is the owner of the folder.

    Raises:
        RepositoryError: ``repository.not_found``.
    """
    from edgekit.repository.store import Store  # noqa: PLC0415 - tuf is slow to load

    store = Store.open(folder)
    place = folder.resolve()
    fields = {
        "folder": _quoted(place),
        "keys": _quoted(store.keys_dir.resolve()),
        "user": user or pwd.getpwuid(place.stat().st_uid).pw_name,
        "python": _quoted(Path(sys.executable)),
    }
    return {"edgekit-refresh.service": _SERVICE.format(**fields), "edgekit-refresh.timer": _TIMER.format(**fields)}


def _quoted(path: Path) -> str:
    """A path as systemd reads it: quoted where it has a space, percent signs doubled."""
    text = str(path).replace("%", "%%")
    return f'"{text}"' if any(character.isspace() for character in text) else text
