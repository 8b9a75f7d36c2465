"""A worker that is started before anybody knows what it shall serve: its imports run while the supervisor's do.

At a start with an installed model most of the time goes into loading Python, numpy and the runtime, one process after the
other. So the first worker is started at once, loads what the active slot's manifest names, and waits on a socket for its real
task: the arguments of an ordinary worker with their descriptors. Where nothing is installed there is no spare, and one that is
not there any more when it is wanted is no loss: a worker is started as always.

    >>> take()  # nobody started one here
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.agent.interpreter import module_command

MODULES = {"onnxruntime": "edgekit.runtime.ort", "litert": "edgekit.runtime.litert"}
MAX_TASK_BYTES = 4096
MAX_DESCRIPTORS = 16
SPARE_FLAG = "--spare"
ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Of every worker."""


@dataclass
class SpareProcess:
    """The process, with what :class:`asyncio.subprocess.Process` offers of use here."""

    pid: int
    returncode: int | None = None
    _ended: asyncio.Event = field(default_factory=asyncio.Event)
    _pidfd: int = -1

    def follow(self) -> None:
        """Hear of its end, in the running loop."""
        self._pidfd = os.pidfd_open(self.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        try:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            self.returncode = 255
        self._ended.set()

    async def wait(self) -> int:
        """Its exit code, when it has ended."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """End it at once."""
        if self.returncode is None:
            os.kill(self.pid, 9)


@dataclass
class _Waiting:
    pid: int
    wire: socket.socket


_waiting: list[_Waiting] = []


def runtime_in_use(state_dir: Path) -> str:
    """The runtime of the model in the active slot; empty where none is installed. Nothing here is trusted: it is a guess."""
    try:
        state = json.loads((state_dir / "state.json").read_bytes())
        slot = next(slot for slot in state["slots"] if slot["name"] == state["active"])
        manifest = json.loads((state_dir / "slots" / slot["name"] / "manifest.json").read_bytes())
        wanted = next(each for each in manifest["variants"] if each["name"] == slot["variant"])
        return str(wanted["requires"]["runtime"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return ""


def start_spare(state_dir: Path) -> tuple[int, int] | None:
    """Start one for what is installed; its process id and the descriptor of its socket, which an exec leaves open."""
    module = MODULES.get(runtime_in_use(state_dir))
    if module is None or not hasattr(os, "pidfd_open"):
        return None
    ours, theirs = socket.socketpair()
    command = module_command("edgekit.agent.worker_process", SPARE_FLAG, str(theirs.fileno()), module)
    try:
        process = subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), env=ENVIRONMENT | dict(os.environ)
        )
    except OSError:
        return None  # a worker is started as always, or the reason is told then
    finally:
        theirs.close()
    process.returncode = 0  # it is not this object's to wait for
    os.set_inheritable(ours.fileno(), True)  # noqa: FBT003 - the library's signature
    return process.pid, ours.detach()


def keep(pid: int, descriptor: int) -> None:
    """The process that was started before this one's exec."""
    os.set_inheritable(descriptor, False)  # noqa: FBT003 - the library's signature
    _waiting.append(_Waiting(pid, socket.socket(fileno=descriptor)))


def take() -> _Waiting | None:
    """The spare that waits, once."""
    return _waiting.pop() if _waiting else None


async def release() -> SpareProcess | None:
    """Let a spare go that nobody wanted: it ends when its socket is closed."""
    if (spare := take()) is None:
        return None
    process = SpareProcess(spare.pid)
    with contextlib.suppress(OSError):
        process.follow()
    spare.wire.close()
    return process


def hand_over(spare: _Waiting, arguments: Sequence[str], descriptors: Sequence[int]) -> SpareProcess | None:
    """Give a spare its task; None when it is not there any more.

    Args:
        spare: as :func:`take` gave it.
        arguments: of a worker, with ``{0}``, ``{1}``, ... in the place of the descriptors.
        descriptors: what they stand for.
    """
    process = SpareProcess(spare.pid)
    with contextlib.closing(spare.wire):
        try:
            process.follow()
            socket.send_fds(spare.wire, [json.dumps(list(arguments)).encode()], list(descriptors))
        except OSError:
            process.kill()
            return None
    return process


def receive(wire: socket.socket) -> list[str] | None:
    """The spare's side: wait for the task; the arguments with real descriptors, None when nobody wants it any more."""
    data, descriptors, _, _ = socket.recv_fds(wire, MAX_TASK_BYTES, MAX_DESCRIPTORS)
    if not data:
        return None
    return [text.format(*descriptors) for text in json.loads(data)]
