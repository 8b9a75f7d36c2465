"""Requests to a running agent, as files in its state folder: who may write there may command the agent, and nobody else.

inbox/request.json   what is asked for; the agent takes it away
inbox/answer.json    what became of it
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.errors import ArtifactError, DeviceError
from edgekit.schema.base import Record, decode_json, encode_json

MAX_BYTES = 16 * 1024
_STEP_S = 0.2


class InstallRequest(Record, frozen=True, kw_only=True):
    """Install from a stick."""

    id: str
    stick: str
    """The folder."""


class InstallAnswer(Record, frozen=True, kw_only=True):
    """What became of a request. ``code`` is empty when it was done or nothing was to do."""

    id: str
    text: str
    code: str = ""
    at: datetime


class Inbox:
    """The folder, from both sides."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "inbox"

    def take(self) -> InstallRequest | None:
        """The request that waits, which is gone then; one that cannot be read is dropped."""
        path = self._folder / "request.json"
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES)
            path.unlink()
            return decode_json(data, InstallRequest, name=str(path))
        except (OSError, ArtifactError):
            return None

    def answer(self, answer: InstallAnswer) -> None:
        """Leave the answer to a request."""
        write_durably(self._folder / "answer.json", encode_json(answer), mode=PRIVATE_FILE)

    def ask(self, request: InstallRequest, *, timeout_s: float) -> InstallAnswer:
        """Leave a request and wait for its answer.

        Raises:
            DeviceError: ``agent.silent``.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        write_durably(self._folder / "request.json", encode_json(request), mode=PRIVATE_FILE)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            time.sleep(_STEP_S)
            try:
                answer = decode_json((self._folder / "answer.json").read_bytes(), InstallAnswer)
            except (OSError, ArtifactError):
                continue
            if answer.id == request.id:
                return answer
        raise DeviceError(
            "agent.silent", f"{self._folder.parent}: the agent did not answer within {timeout_s:g} s.", hint="See its log."
        )


def new_answer(request: InstallRequest, text: str, *, code: str = "") -> InstallAnswer:
    """An answer of now."""
    return InstallAnswer(id=request.id, text=text, code=code, at=datetime.now(UTC))
