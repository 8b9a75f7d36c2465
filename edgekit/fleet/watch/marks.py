"""What the ingest tells the watch: in which stretches of time a model's windows were added, replaced or moved.

A mark is written with the windows themselves, in one transaction, so that none is ever seen without the other.

>>> marks = Marks()
>>> marks.is_empty
True
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, func, select

from edgekit.fleet.bulk import insert_rows
from edgekit.fleet.tables import model_windows
from edgekit.fleet.watch.tables import MARK_MS, window_marks
from edgekit.schema.message import Window

DIGEST_DIGITS = 12


class Marks:
    """Marks that wait for the end of a batch; equal ones are one."""

    def __init__(self) -> None:
        self._found: set[tuple[str, int, int]] = set()

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._found

    def add(self, window: Window, start_ms: int) -> None:
        """A window is stored; a merged one takes the place of others within its time."""
        end_ms = start_ms + window.duration_ms if window.merged else start_ms
        for model in window.models:
            self._found.add((model.model_digest[:DIGEST_DIGITS], _floor(start_ms), _floor(end_ms)))

    def flush(self, connection: Connection) -> None:
        """Write them."""
        insert_rows(connection, window_marks, sorted(self._found))
        self._found.clear()

    @staticmethod
    def note_move(connection: Connection, device_id: int, boot: int, last_seq: int, delta_ms: int) -> None:
        """A boot's windows up to ``last_seq`` are about to be moved in time: mark where they are, and where they will be."""
        row = model_windows.c
        here = (row.device_id == device_id, row.boot == boot, row.seq <= last_seq)
        statement = select(row.model_digest, func.min(row.start_ms), func.max(row.start_ms)).where(*here)
        ranges = connection.execute(statement.group_by(row.model_digest)).all()
        insert_rows(connection, window_marks, list(_moved(((item[0], item[1], item[2]) for item in ranges), delta_ms)))


def _moved(ranges: Iterable[tuple[str, int, int]], delta_ms: int) -> Iterable[tuple[str, int, int]]:
    for digest, first, last in ranges:
        for delta in (0, delta_ms):
            yield digest, _floor(max(0, first + delta)), _floor(max(0, last + delta))


def _floor(time_ms: int) -> int:
    return time_ms - time_ms % MARK_MS
