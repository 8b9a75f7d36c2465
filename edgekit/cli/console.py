"""Output of the command line: data on stdout, everything else on stderr.

Colour only on a terminal and without ``NO_COLOR``; tables with right-aligned numbers; progress as one rewritten line with an
ETA on a terminal and as a line a stage elsewhere.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any, Literal, TextIO

from edgekit.schema.base import encode_json

Style = Literal["bold", "dim", "red", "green", "yellow", "cyan"]
_CODES: dict[Style, str] = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_REDRAW_SECONDS = 0.1
_MIN_TEXT = 24
_INDENT = 4


def is_colored(stream: TextIO) -> bool:
    """Whether the stream is a terminal that wants colour."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, *styles: Style, stream: TextIO | None = None) -> str:
    """The text with ANSI styles, or unchanged where colour is off."""
    if not styles or not is_colored(stream or sys.stdout):
        return text
    return f"\x1b[{';'.join(_CODES[s] for s in styles)}m{text}\x1b[0m"


def out(text: str = "") -> None:
    """Write a line of data to stdout."""
    sys.stdout.write(text + "\n")


def out_json(record: Any) -> None:
    """Write a record to stdout as JSON."""
    sys.stdout.write(encode_json(record).decode())


def note(text: str = "", *styles: Style) -> None:
    """Write a line for people to stderr."""
    sys.stderr.write(paint(text, *styles, stream=sys.stderr) + "\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    """Write a warning to stderr."""
    note(f"warning: {text}", "yellow")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A plain table; columns in ``right`` are right-aligned, numbers are never cut.

    On a terminal that is too narrow the last column's text is wrapped below itself where it has room, otherwise a row takes
    several lines, each after the first indented.

    >>> print(table(["name", "ms"], [["fp32", "1.25"], ["int8", "0.5"]], right=[1]))
    name    ms
    fp32  1.25
    int8   0.5
    """
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    limit = shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 10_000
    lines = _fold(widths, limit, is_last_text=len(widths) - 1 not in right)

    def render(values: Sequence[str]) -> list[str]:
        rendered = []
        for number, columns in enumerate(lines):
            indent = " " * _INDENT if number else ""
            parts = [values[i].rjust(widths[i]) if i in right else values[i].ljust(widths[i]) for i in columns]
            line = indent + "  ".join(parts).rstrip()
            if len(line) <= limit:
                rendered += [line] if line.strip() else []
                continue
            start = len(indent) + sum(widths[i] + 2 for i in columns[:-1])
            texts = textwrap.wrap(values[columns[-1]], max(limit - start, 1)) or [""]
            rendered.append(line[:start] + texts[0])
            rendered += [" " * start + text for text in texts[1:]]
        return rendered

    return "\n".join([*(paint(line, "bold") for line in render(headers)), *(line for row in cells for line in render(row))])


def _fold(widths: Sequence[int], limit: int, *, is_last_text: bool) -> list[list[int]]:
    """The columns of each line of a row; the last column may be narrower than its text, which is wrapped then."""
    lines: list[list[int]] = [[]]
    used = 0
    for i, width in enumerate(widths):
        is_wrapped = is_last_text and i == len(widths) - 1
        needed = min(width, _MIN_TEXT) if is_wrapped else width
        if lines[-1] and used + needed > limit:
            lines.append([])
            used = _INDENT
        lines[-1].append(i)
        used += width + 2
    return lines


def format_bytes(count: float) -> str:
    """Bytes for people, decimal units: ``1.23 MB``."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def format_seconds(seconds: float) -> str:
    """A duration for people: ``0.8 s``, ``42 s``, ``3 min 05 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _columns_of(stream: TextIO) -> int:
    """The width of the terminal behind a stream: of stderr itself, since stdout may go to a file."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class Progress:
    """Progress of long work on stderr: a bar with ETA on a terminal, one line a stage elsewhere."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._is_live = sys.stderr.isatty() and not is_quiet
        self._started = time.monotonic()
        self._stage = ""
        self._drawn = 0.0

    def update(self, stage: str, done: float = 0.0) -> None:
        """Show a stage with its fraction done, 0..1, of the whole work."""
        if self._is_quiet:
            return
        now = time.monotonic()
        if not self._is_live:
            if stage != self._stage:
                self._stage = stage
                note(f"[{format_seconds(now - self._started):>6}] {stage}")
            return
        if stage == self._stage and now - self._drawn < _REDRAW_SECONDS:
            return
        self._stage, self._drawn = stage, now
        spent = now - self._started
        eta = f"  ETA {format_seconds(spent / done - spent)}" if 0.02 < done < 1 else ""
        filled = round(20 * min(max(done, 0.0), 1.0))
        text = f"{'█' * filled}{'░' * (20 - filled)} {done:4.0%}  {stage}{eta}"
        sys.stderr.write("\r\x1b[K" + text[: _columns_of(sys.stderr) - 1])
        sys.stderr.flush()

    def clear(self) -> None:
        """Remove the bar, so that a line can be written."""
        if self._is_live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
