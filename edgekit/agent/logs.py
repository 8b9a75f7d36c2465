"""Logs of the device's processes: one line an event, ``key=value``, on stderr, and the supervisor's in the state folder, too.

The file is for devices whose journal does not outlive a reboot. It is kind to flash memory: capped, two files in all, never
synced (the kernel writes it back when it sees fit, many lines at once), and a line that comes again and again is counted
instead of written.

state_dir/agent.log     the newer half
state_dir/agent.log.1   the older half
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LOG_FILE = "agent.log"
REPEAT_SECONDS = 60.0
MAX_LINE = 4000
FOLLOW_STEP_S = 0.25
_TAIL_CHUNK = 64 << 10


class _KeyValueFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__(
            "time=%(asctime)s.%(msecs)03dZ level=%(levelname)s logger=%(name)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S"
        )
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        return super().format(record)


class CappedFile(logging.Handler):
    """The log in the state folder. What the disk refuses is lost, and disturbs nobody.

    Args:
        path: the newer file; the older one is beside it.
        max_bytes: of both together.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        super().__init__()
        self._path, self._half = path, max_bytes // 2
        self._descriptor = -1
        self._size = 0
        self._last: tuple[str, int, str] = ("", 0, "")
        self._last_at = 0.0
        self._repeats = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, unless it is the one before again."""
        try:
            key, now = (record.name, record.levelno, record.getMessage()), time.monotonic()
            if key == self._last and now - self._last_at < REPEAT_SECONDS:
                self._repeats += 1
                return
            repeats, self._repeats = self._repeats, 0
            self._last, self._last_at = key, now
            line = self.format(record).replace("\n", "\\n")[:MAX_LINE]
            self._write(f"{line} repeats_before={repeats}\n" if repeats else f"{line}\n")
        except OSError:
            self.close_file()
        except Exception:  # noqa: BLE001 - as every handler of the library: a log line must not end the agent
            self.handleError(record)

    def _write(self, line: str) -> None:
        data = line.encode(errors="replace")
        if self._descriptor >= 0 and self._size + len(data) > self._half:
            self.close_file()
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        if self._descriptor < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._descriptor).st_size
        self._size += os.write(self._descriptor, data)

    def close_file(self) -> None:
        """Give the file back; the next line opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def close(self) -> None:
        """End."""
        self.close_file()
        super().close()


def start_logging(level: int = logging.INFO) -> None:
    """Send every logger of this process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_KeyValueFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for chatty in ("urllib3", "tuf", "asyncio", "securesystemslib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def keep_log(state_dir: Path, max_bytes: int) -> None:
    """Keep the lines of this process in the state folder, too; 0 bytes: do not."""
    if max_bytes:
        handler = CappedFile(state_dir / LOG_FILE, max_bytes)
        handler.setFormatter(_KeyValueFormatter())
        logging.getLogger().addHandler(handler)


# --- reading it


def last_lines(state_dir: Path, count: int) -> list[str]:
    """The last lines of both files, the oldest first."""
    lines: list[str] = []
    for name in (LOG_FILE, f"{LOG_FILE}.1"):
        missing = count - len(lines)
        if missing <= 0:
            break
        lines = _tail(state_dir / name, missing) + lines
    return lines


def _tail(path: Path, count: int) -> list[str]:
    """The last lines of a file, read from its end."""
    data = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position and data.count(b"\n") <= count:
            step = min(_TAIL_CHUNK, position)
            position -= step
            file.seek(position)
            data = file.read(step) + data
    return data.decode(errors="replace").splitlines()[-count:] if count else []


def follow(state_dir: Path) -> Iterator[str]:
    """Lines from now on, also over the change of the file; it ends when nobody wants more."""
    path = state_dir / LOG_FILE
    try:
        file = path.open("rb")
        file.seek(0, os.SEEK_END)
    except FileNotFoundError:
        file = None
    rest = b""
    while True:
        if file is None:
            with contextlib.suppress(FileNotFoundError):
                file = path.open("rb")
        if file is not None and (data := file.read()):
            *lines, rest = (rest + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
            continue
        if file is not None and _is_replaced(path, file.fileno()):
            file.close()
            file = None
            continue
        time.sleep(FOLLOW_STEP_S)


def _is_replaced(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino != os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False  # the next line makes it
