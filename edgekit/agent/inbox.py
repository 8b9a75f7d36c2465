"""Requests to a running agent, as files in its state folder: who may write there may command the agent, and nobody else.

inbox/<id>.request.json   what is asked for; the agent takes it away
inbox/<id>.edgekit        the bundle that it brings, if any; the agent takes it away, too
inbox/<id>.answer.json    what became of it; who asked takes it away
inbox/bell                a pipe: a byte wakes the agent, so that it need not look all the time
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgekit.durable import PRIVATE_FILE, TEMPORARY_PREFIX, write_durably
from edgekit.errors import ArtifactError, DeviceError, EnvironmentFault
from edgekit.schema.base import Record, decode_json, encode_json

MAX_BYTES = 16 * 1024
STALE_SECONDS = 86400.0
_STEP_S = 0.05
_SLOWEST_STEP_S = 0.5
_CHUNK = 1 << 20

RequestId = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9-]{1,64}$")]
RequestKind = Literal["install", "install_file", "rollback", "allow_again", "pause", "resume"]


class Request(Record, frozen=True, kw_only=True):
    """What is asked for.

    ``stick`` is a folder, ``model`` a model's name (empty: the first one), ``seconds`` the length of a pause. The bundle of
    "install_file" lies in the inbox under the request's id; ``name`` is what it was called.
    """

    id: RequestId
    kind: RequestKind = "install"
    stick: str = ""
    name: str = ""
    model: str = ""
    seconds: float = 0.0


class Answer(Record, frozen=True, kw_only=True):
    """What became of a request. ``code`` is empty when it was done or nothing was to do."""

    id: RequestId
    text: str
    code: str = ""
    at: datetime


class Inbox:
    """The folder, from both sides."""

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "inbox"

    # --- the agent's side

    def open_bell(self) -> int:
        """Make the folder and the pipe, remove what nobody fetched, and open the pipe for reading; its descriptor.

        Raises:
            OSError: when the disk refuses.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        for path in self._folder.iterdir():
            is_ours = path.name.startswith(TEMPORARY_PREFIX) or path.suffix in {".json", ".edgekit"}
            with contextlib.suppress(OSError):
                if is_ours and time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
        bell = self._folder / "bell"
        with contextlib.suppress(FileExistsError):
            os.mkfifo(bell, PRIVATE_FILE)
        return os.open(bell, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)

    async def wait(self, bell: int, seconds: float) -> None:
        """Sleep until the bell rings, or so long."""
        loop = asyncio.get_running_loop()
        rung = asyncio.Event()
        loop.add_reader(bell, rung.set)
        try:
            async with asyncio.timeout(seconds):
                await rung.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(bell)
            with contextlib.suppress(BlockingIOError):
                os.read(bell, 4096)

    def take(self) -> Request | None:
        """The request that waits longest, which is gone then; one that cannot be read is dropped."""
        try:
            waiting = sorted(self._folder.glob("*.request.json"), key=lambda path: path.stat().st_mtime_ns)
        except OSError:
            return None
        for path in waiting:
            try:
                with path.open("rb") as file:
                    data = file.read(MAX_BYTES)
            except OSError:
                continue  # not handed over yet
            path.unlink(missing_ok=True)
            try:
                request = decode_json(data, Request, name=str(path))
            except ArtifactError:
                continue
            if f"{request.id}.request.json" == path.name:
                return request
        return None

    def bundle(self, request: Request) -> Path:
        """Where the bundle of a request lies."""
        return self._folder / f"{request.id}.edgekit"

    def answer(self, answer: Answer) -> None:
        """Leave the answer to a request; the bundle that it brought is removed."""
        write_durably(self._folder / f"{answer.id}.answer.json", encode_json(answer), mode=PRIVATE_FILE)
        (self._folder / f"{answer.id}.edgekit").unlink(missing_ok=True)

    # --- who asks

    def ask(self, request: Request, *, timeout_s: float, bundle: Path | None = None) -> Answer:
        """Leave a request and wait for its answer.

        Args:
            request: what is wanted.
            timeout_s: how long to wait.
            bundle: a bundle that is handed over with it.

        Raises:
            DeviceError: ``agent.silent``.
            EnvironmentFault: ``state.unwritable`` when this user may not command this agent.
        """
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._give(self._folder)
            if bundle is not None:
                with bundle.open("rb") as file:
                    write_durably(self.bundle(request), iter(lambda: file.read(_CHUNK), b""), mode=PRIVATE_FILE)
                self._give(self.bundle(request))
            path = self._folder / f"{request.id}.request.json"
            write_durably(path, encode_json(request), mode=PRIVATE_FILE)
            self._give(path)
        except OSError as error:
            raise EnvironmentFault(
                "state.unwritable",
                f"{self._folder}: cannot leave a request there: {error.strerror}.",
                hint="Run this as the agent's user, or as root.",
            ) from error
        self._ring()
        return self._wait_answer(request, timeout_s)

    def _give(self, path: Path) -> None:
        """What root leaves belongs to the agent's user."""
        if os.geteuid() == 0 and path.exists():
            owner = self._folder.parent.stat()
            if owner.st_uid != 0:
                with contextlib.suppress(FileNotFoundError):  # taken already
                    os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # nobody listens: an agent that starts later finds the request
            descriptor = os.open(self._folder / "bell", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                    os.write(descriptor, b"!")
            finally:
                os.close(descriptor)

    def _wait_answer(self, request: Request, timeout_s: float) -> Answer:
        path = self._folder / f"{request.id}.answer.json"
        deadline, step_s = time.monotonic() + timeout_s, _STEP_S
        while time.monotonic() < deadline:
            time.sleep(step_s)
            step_s = min(_SLOWEST_STEP_S, step_s * 1.2)
            try:
                answer = decode_json(path.read_bytes(), Answer)
            except (OSError, ArtifactError):
                continue
            path.unlink(missing_ok=True)
            return answer
        for left in (self._folder / f"{request.id}.request.json", self.bundle(request)):
            left.unlink(missing_ok=True)
        raise DeviceError(
            "agent.silent",
            f"{self._folder.parent}: the agent did not answer within {timeout_s:g} s.",
            hint='See its log: "edgekit agent logs".',
        )


def new_answer(request: Request, text: str, *, code: str = "") -> Answer:
    """An answer of now."""
    return Answer(id=request.id, text=text, code=code, at=datetime.now(UTC))
