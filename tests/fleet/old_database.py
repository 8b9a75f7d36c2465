"""A database as the release before alembic made it: three devices with windows, events, a label and a sample each."""

from __future__ import annotations

import sqlite3
from pathlib import Path

FIXTURE = Path(__file__).resolve().parent / "fixtures" / "fleet-v2.sql"


def make_old_database(path: Path) -> Path:
    """Write it to a file."""
    db = sqlite3.connect(path)
    db.executescript(FIXTURE.read_text())
    db.close()
    return path
