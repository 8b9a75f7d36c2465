"""Moments as people write them: a date, a date with a time, or how long from now; UTC unless an offset is given.

>>> parse_moment("2027-06-30", flag="--deadline", now=datetime(2026, 11, 1, tzinfo=UTC)).isoformat()
'2027-06-30T00:00:00+00:00'
>>> parse_moment("+36h", flag="--deadline", now=datetime(2026, 11, 1, tzinfo=UTC)).isoformat()
'2026-11-02T12:00:00+00:00'
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from edgekit.errors import UsageError

_SPAN = re.compile(r"\+([0-9]{1,6})(min|h|d|w)\Z")
_UNITS = {"min": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def parse_moment(text: str, *, flag: str, now: datetime) -> datetime:
    """An aware UTC time, in whole seconds.

    Args:
        text: ``2027-06-30``, ``2027-06-30T12:00``, ``2027-06-30T12:00+02:00``, ``+7d``, ``+12h``, ``+30min`` or ``+2w``.
        flag: for the error message.
        now: the time, UTC.

    Raises:
        UsageError: ``moment.unparsable``.
    """
    span = _SPAN.match(text.strip())
    try:
        moment = now + int(span[1]) * _UNITS[span[2]] if span else datetime.fromisoformat(text.strip())
        aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return aware.astimezone(UTC).replace(microsecond=0)
    except (ValueError, OverflowError) as error:
        hint = "For example 2027-06-30, 2027-06-30T12:00 (UTC) or +7d."
        raise UsageError("moment.unparsable", f"{flag} {text}: not a time.", hint=hint) from error
