"""The agent's state on disk: one JSON file, replaced atomically, and the lock that keeps a second agent out.

    store = StateStore.open(Path("/var/lib/edgekit"), device="cam-7")
    store.update(phase="fetch", intent="kws@2.0.0#7")

A state file that cannot be read is set aside, and the state is rebuilt from what the slots themselves say (each slot keeps
the signed metadata's record of its release): the last good model keeps serving and no release floor is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edgekit.agent.slots import SlotStore
from edgekit.bundle.opening import CURABLE_PREFIX
from edgekit.durable import PRIVATE_FILE, make_folder, sweep_temporaries, sync_folder, write_durably
from edgekit.errors import ArtifactError, DeviceError, EnvironmentFault
from edgekit.schema.base import SCHEMA_VERSION, decode_json, encode_json
from edgekit.schema.state import AgentState, Slot

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
LOCK_FILE = "agent.lock"
PRIVATE_DIR = 0o700


def prepare_dir(path: Path) -> None:
    """Make the state folder, private to its owner.

    Raises:
        EnvironmentFault: ``state.unwritable``.
    """
    try:
        make_folder(path, mode=PRIVATE_DIR)
        path.chmod(PRIVATE_DIR)
    except OSError as error:
        raise EnvironmentFault(
            "state.unwritable",
            f"{path}: cannot use it as the state folder: {error.strerror}.",
            hint="Give another folder with --state-dir, or run the agent as a user that owns this one.",
        ) from error


class DirLock:
    """The state folder's lock; the kernel releases it when the process ends, however it ends."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / LOCK_FILE
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            EnvironmentFault: ``agent.already_running``, naming the process that has it.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise EnvironmentFault(
                "agent.already_running",
                f"{self._path.parent}: another agent (process {holder}) runs on this state folder.",
                hint="Stop it first, or give this agent a --state-dir of its own.",
            ) from error
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, without its holder's name
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class StateStore:
    """The state in memory and on disk; every change is on disk before ``update`` returns."""

    def __init__(self, path: Path, state: AgentState, *, damage: str = "") -> None:
        self._path = path
        self._state = state
        self.damage = damage
        """Why the state was rebuilt from the slots at this start; empty: it was not."""
        self._guard = threading.Lock()

    @classmethod
    def open(cls, state_dir: Path, *, device: str) -> StateStore:
        """Read the state, or rebuild it from the slots where it is missing or damaged.

        A release that was refused for the lack of a key or package may be tried again: who starts the agent may have cured it.
        """
        path = state_dir / STATE_FILE
        damage = ""
        sweep_temporaries(state_dir)
        try:
            state = _read_state(path)
        except ArtifactError as error:
            aside = path.with_suffix(".damaged")
            damage = error.message
            path.replace(aside)
            sync_folder(state_dir)
            logger.error("event=state_damaged aside=%s error=%r", aside.name, error.message)  # noqa: TRY400 - expected, handled
            state = None
        if state is None:
            state = rebuild_state(SlotStore(state_dir), device)
            if not damage and state.active is not None:
                damage = f"{path}: was gone."
        refusals = tuple(refusal for refusal in state.refusals if not refusal.code.startswith(CURABLE_PREFIX))
        return cls(path, msgspec.structs.replace(state, device=device, refusals=refusals), damage=damage)

    @property
    def state(self) -> AgentState:
        """The state now."""
        return self._state

    def update(self, **changes: Any) -> AgentState:
        """Replace fields, durably.

        Raises:
            OSError: when the disk refuses; the state in memory is then unchanged.
        """
        with self._guard:
            return self._save(msgspec.structs.replace(self._state, **changes))

    def update_slot(self, slot: Slot) -> AgentState:
        """Replace the slot that does not serve.

        Raises:
            DeviceError: ``install.superseded`` when it serves by now; the plan was made before a rollback.
        """
        with self._guard:
            if self._state.active == slot.name:
                raise DeviceError("install.superseded", f"slot {slot.name} serves again since the installation was planned.")
            slots = tuple(slot if old.name == slot.name else old for old in self._state.slots)
            return self._save(msgspec.structs.replace(self._state, slots=slots))

    def transform(self, change: Callable[[AgentState], AgentState]) -> AgentState:
        """Replace the state by a function of itself; nobody else changes it meanwhile."""
        with self._guard:
            return self._save(change(self._state))

    def _save(self, state: AgentState) -> AgentState:
        if state != self._state or not self._path.exists():
            write_durably(self._path, encode_json(state), mode=PRIVATE_FILE)
            self._state = state
        return state


def _read_state(path: Path) -> AgentState | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    state = decode_json(data, AgentState, name=str(path))
    if state.schema_version > SCHEMA_VERSION:
        raise ArtifactError(
            "state.from_future",
            f"{path}: written by a newer agent (schema {state.schema_version}, this one knows {SCHEMA_VERSION}).",
        )
    return state


def rebuild_state(slots: SlotStore, device: str) -> AgentState:
    """What the slots prove by themselves: the committed one with the highest release counter becomes active.

    Where none was committed, the newest complete one does: a model that might be bad is better than none, and its self-test
    comes before it serves.
    """
    found = [slot for name in ("a", "b") if (slot := slots.recover(name)) is not None]
    found.sort(key=lambda slot: (slot.status == "good", slot.counter))
    active = found[-1] if found else None
    floors = AgentState(device=device).floors
    if active:
        floors = msgspec.structs.replace(floors, releases={active.model: active.counter})
    by_name = {slot.name: slot for slot in found}
    if active:
        by_name[active.name] = msgspec.structs.replace(active, status="active")
    return AgentState(
        device=device,
        slots=(by_name.get("a", Slot(name="a")), by_name.get("b", Slot(name="b"))),
        active=active.name if active else None,
        floors=floors,
    )
