"""A debug bundle: what somebody far away needs to see what is wrong with a device, and no more than that.

A ``tar.gz`` of at most ``MAX_BYTES``: the agent's status, its states, its settings, its checks, the log's end, the commands it
got, the sizes of what lies in the state folder. No model, no input, no output, no spooled message, and no secret: settings that
name one are left out, and whatever looks like a key or a password in a line of log is struck out.
"""

from __future__ import annotations

import io
import os
import platform
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edgekit import __version__
from edgekit.agent.audit import AuditLog
from edgekit.agent.checkup import check_agent
from edgekit.agent.config import AgentConfig
from edgekit.agent.logs import last_lines

MAX_BYTES = 1 << 20
LOG_LINES = 4000
MAX_LISTED = 500
STRUCK_OUT = "[struck out]"
_SECRET_SETTING = re.compile(r"password|secret|token|username|identity|key_file\Z")
_SECRET_TEXT = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"AGE-SECRET-KEY-1[A-Z0-9]+", re.IGNORECASE),
    re.compile(r"(?i)(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"(?i)\b(?:password|passwd|passphrase|secret|token|authorization)\b[\"']?\s*[=:]\s*(?:bearer\s+)?\S+"),
)


def strike_out(text: str) -> str:
    """The text without what looks like a secret.

    >>> strike_out("mqtts://cam:hunter2@broker password=hunter2")
    'mqtts://[struck out]@broker [struck out]'
    """
    for pattern in _SECRET_TEXT:
        text = pattern.sub(STRUCK_OUT, text)
    return text


def public_settings(config: AgentConfig) -> dict[str, object]:
    """The settings, without those that name a secret."""
    fields = msgspec.to_builtins(config)
    return {name: STRUCK_OUT if _SECRET_SETTING.search(name) and value else value for name, value in fields.items()}


def _listing(folder: Path) -> Iterator[str]:
    """Names, modes and sizes of what lies in the state folder."""
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if number == MAX_LISTED:
            yield "..."
            return
        try:
            stat = path.lstat()
        except OSError:
            continue
        yield f"{stat.st_mode:o} {stat.st_uid} {stat.st_size:>12} {int(stat.st_mtime)} {path.relative_to(folder)}"


def _texts(config: AgentConfig, status: bytes) -> Iterator[tuple[str, str]]:
    """What goes in, the most telling first: what is too much at the end is left out."""
    folder = config.state_path
    yield "about.txt", f"edgekit {__version__}\n{platform.platform()}\nPython {platform.python_version()}\n{time.time():.0f}\n"
    yield "settings.json", msgspec.json.format(msgspec.json.encode(public_settings(config)), indent=2).decode()
    yield "checks.json", msgspec.json.format(msgspec.json.encode(check_agent(config)), indent=2).decode()
    if status:
        yield "status.json", status.decode(errors="replace")
    for state in sorted([*folder.glob("state.json"), *folder.glob("models/*/state.json")]):
        yield "states/" + str(state.relative_to(folder)).replace("/", "-"), _read(state)
    yield "commands.jsonl", "".join(f"{msgspec.json.encode(entry).decode()}\n" for entry in AuditLog(folder).read()[-200:])
    yield "files.txt", "\n".join(_listing(folder)) + "\n"
    yield "memory.txt", _read(Path("/proc/meminfo"))
    yield "pressure.txt", "".join(f"{name}\n{_read(Path('/proc/pressure') / name)}" for name in ("cpu", "memory", "io"))
    yield "agent.log", "\n".join(last_lines(folder, LOG_LINES)) + "\n"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        return f"{error}\n"


def make_bundle(config: AgentConfig, status: bytes, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The archive; the log is cut, from its beginning, until it fits.

    Args:
        config: the agent's settings.
        status: its own view, JSON; empty when it does not run.
        max_bytes: of the archive.
    """
    texts = {name: strike_out(text) for name, text in _texts(config, status)}
    while True:
        data = _archive(config.device, texts)
        if len(data) <= max_bytes or not any(texts.values()):
            return data
        longest = max(texts, key=lambda name: len(texts[name]))
        texts[longest] = texts[longest][len(texts[longest]) // 2 + 1 :]


def _archive(device: str, texts: dict[str, str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=6) as archive:
        for name, text in texts.items():
            data = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"{device}/{name}")
            entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
            entry.uid, entry.gid = os.getuid(), os.getgid()
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()
