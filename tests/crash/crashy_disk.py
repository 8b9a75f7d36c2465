"""A disk that may lose power at any moment: record what real code does to a folder, then build every state it may wake up in.

The recorder lets the code work on a real folder and patches what ``os`` offers to change one (``pathlib``, ``shutil`` and
``tempfile`` call that). Whatever else changed, data written through Python's file objects for example, is found by comparing
the folder with what it was, inode by inode, before and after each patched call. The model is more pessimistic than ext4:

- the data of a file is durable once the file was fsynced; until then a power cut leaves what was durable before, nothing, a
  part, the right length with zeros at the end, or all of it. Bytes in front of an append stay as durable as they were;
- a name in a folder is durable once the folder was fsynced; until then it may be there or not, whatever was done after it;
- a rename is one step: never both names, never none;
- a file that was fsynced and whose name was not is lost; so is everything in a folder whose own name is.

A crash state is one choice for everything that is not durable. Between two fsyncs the choices only grow, so the moments that
matter are those just before an fsync, just before a promise (see ``Recorder.promise``) and the end. What an fsync gives is
independent of the code that asked for it, so that a trace without the events of one call in the source is the trace of a
program in which that fsync was forgotten.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import itertools
import linecache
import math
import os
import random
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import edgekit

ALL_STATES = 1 << 9
"""Of one moment; where there are more, the telling ones and a tenth as many drawn ones are taken."""
SOME_STATES = 1 << 6
"""The same where one fsync is forgotten: to find out that it is needed takes one state."""
ROOT = 0
_SOURCE = Path(edgekit.__file__).parent
_DURABLE = _SOURCE / "durable.py"
_CHANGERS = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link", "symlink", "truncate", "ftruncate")
_MAKES = os.O_CREAT | os.O_TRUNC
_real = {name: getattr(os, name) for name in (*_CHANGERS, "open", "fsync", "fdatasync")}

Content = bytes | str | None
"""Of an inode: a file's bytes, a link's target, None for a folder."""


@dataclass(frozen=True)
class Site:
    """Which fsync: what was synced, and the lines of edgekit that asked for it, out to the first one outside durable.py."""

    kind: str
    frames: tuple[tuple[str, str, str, int], ...]
    """File, function, text of the line, and its number."""

    @property
    def label(self) -> str:
        """The site in words that stay the same when lines move."""
        steps = [function if name == _DURABLE.name else f"{name}:{function} {text}" for name, function, text, _ in self.frames]
        return f"{self.kind}: {' < '.join(steps)}"

    def __str__(self) -> str:
        lines = " < ".join(f"{name}:{number}" for name, _, _, number in self.frames)
        return f"{self.label}  ({lines})"


@dataclass(frozen=True)
class Write:
    """A file has other bytes."""

    inode: int
    content: bytes


@dataclass(frozen=True)
class Names:
    """Names of folders (inode, name) lead to other inodes, or to none; all of them at once."""

    changes: Mapping[tuple[int, str], int | None]
    lasting: frozenset[int]
    """The folders whose fsync makes this durable."""


@dataclass(frozen=True)
class Sync:
    """An fsync."""

    inode: int
    site: Site


@dataclass(frozen=True)
class Promise:
    """From here on a power cut must leave what ``value`` says."""

    value: object


Event = Write | Names | Sync | Promise


@dataclass
class Trace:
    """What a folder held at first, and what was done to it."""

    names: dict[tuple[int, str], int] = field(default_factory=dict)
    contents: dict[int, Content] = field(default_factory=dict)
    modes: dict[int, int] = field(default_factory=dict)
    """The last ones that were seen, also of inodes that came later."""
    links: dict[int, str] = field(default_factory=dict)
    """Targets of symbolic links, also of those that came later."""
    folders: set[int] = field(default_factory=set)
    """The inodes that are folders, also those that came later."""
    events: list[Event] = field(default_factory=list)
    promised: object = None
    """At the start."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every fsync that was called, once."""
        return tuple(dict.fromkeys(event.site for event in self.events if isinstance(event, Sync)))


class Recorder:
    """Records the changes below a folder while it is entered. Everything that is there at first counts as durable.

    Args:
        root: the folder.
        promised: what holds at first.
        has_hard_links: False is a file system without them.
        on_event: told about every event, after it happened.
    """

    def __init__(
        self,
        root: Path,
        *,
        promised: object = None,
        has_hard_links: bool = True,
        on_event: Callable[[Event], None] = lambda _event: None,
    ) -> None:
        self._root, self._has_hard_links, self._on_event = root, has_hard_links, on_event
        self._lock = threading.RLock()
        self._ids: dict[int, int] = {root.stat().st_ino: ROOT}
        self._numbers = itertools.count(1)
        self.trace = Trace(promised=promised, folders={ROOT})
        self._names, self._contents = self._scan()
        self.trace.names, self.trace.contents = dict(self._names), dict(self._contents)

    def promise(self, value: object) -> None:
        """What was done so far must survive: whoever asked for it was told that it did."""
        with self._lock:
            self._catch_up()
            self._log(Promise(value))

    def __enter__(self) -> Self:
        for name in _CHANGERS:
            setattr(os, name, self._changer(name))
        os.open = self._open
        os.fsync = os.fdatasync = self._sync
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in _real.items():
            setattr(os, name, function)
        self._catch_up()

    # --- what os is while the code runs

    def _changer(self, name: str) -> Callable:
        real = _real[name]

        @functools.wraps(real)
        def change(*args, **named):
            with self._lock:
                if name == "link" and not self._has_hard_links:
                    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
                self._catch_up()
                try:
                    return real(*args, **named)
                finally:
                    self._catch_up(is_one=True)

        return change

    def _open(self, path, flags, *args, **named):
        if not flags & _MAKES:
            return _real["open"](path, flags, *args, **named)
        with self._lock:
            self._catch_up()
            try:
                return _real["open"](path, flags, *args, **named)
            finally:
                self._catch_up()

    def _sync(self, descriptor):
        with self._lock:
            self._catch_up()
            status = os.fstat(descriptor)
            inode = self._ids.get(status.st_ino)
            if inode is not None:
                kind = "folder" if stat.S_ISDIR(status.st_mode) else "file"
                self._log(Sync(inode, Site(kind, _frames(sys._getframe(1)))))

    # --- finding out what changed

    def _scan(self) -> tuple[dict[tuple[int, str], int], dict[int, Content]]:
        names: dict[tuple[int, str], int] = {}
        contents: dict[int, Content] = {ROOT: None}
        ids = {self._root.stat().st_ino: ROOT}
        folders = [(ROOT, str(self._root))]
        while folders:
            folder, path = folders.pop()
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    status = entry.stat(follow_symlinks=False)
                    inode = ids.get(status.st_ino)
                    if inode is None:
                        known = self._ids.get(status.st_ino)
                        inode = next(self._numbers) if known is None else known
                        ids[status.st_ino] = inode
                        contents[inode] = self._read(entry, status, inode)
                    names[folder, entry.name] = inode
                    if stat.S_ISDIR(status.st_mode):
                        folders.append((inode, entry.path))
        self._ids = ids
        return names, contents

    def _read(self, entry: os.DirEntry, status: os.stat_result, inode: int) -> Content:
        self.trace.modes[inode] = stat.S_IMODE(status.st_mode)
        if stat.S_ISLNK(status.st_mode):
            self.trace.links[inode] = str(Path(entry.path).readlink())
            return self.trace.links[inode]
        if stat.S_ISREG(status.st_mode):
            return Path(entry.path).read_bytes()
        self.trace.folders.add(inode)
        return None

    def _catch_up(self, *, is_one: bool = False) -> None:
        """Log what changed since the last look; ``is_one`` when it is the work of one system call."""
        names, contents = self._scan()
        changed = {key: names.get(key) for key in {**self._names, **names} if names.get(key) != self._names.get(key)}
        # what a folder that is gone held is gone with it, and what one that was moved holds moved with it: neither is a change
        steps = [changed] if is_one else [{key: inode} for key, inode in changed.items()]
        events: list[Event] = [Names(step, _lasting(step)) for step in steps if step]
        for inode, content in contents.items():
            if isinstance(content, bytes) and content != self._contents.get(inode, b""):
                events.append(Write(inode, content))
        self._names, self._contents = names, contents
        for event in events:
            self._log(event)

    def _log(self, event: Event) -> None:
        self.trace.events.append(event)
        self._on_event(event)


def _lasting(changes: Mapping[tuple[int, str], int | None]) -> frozenset[int]:
    """Where something gets a name, that folder; where names only go, the folders that they were in."""
    made = frozenset(folder for (folder, _), inode in changes.items() if inode is not None)
    return made or frozenset(folder for folder, _ in changes)


def _frames(frame) -> tuple[tuple[str, str, str, int], ...]:
    found = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_SOURCE):
            text = linecache.getline(str(path), frame.f_lineno).strip()
            step = (str(path.relative_to(_SOURCE)), frame.f_code.co_name, text, frame.f_lineno)
            if not found or found[-1][:3] != step[:3]:  # a recursion counts once
                found.append(step)
            if path != _DURABLE:
                break
        frame = frame.f_back
    return tuple(found)


# --- states


@dataclass(frozen=True)
class State:
    """What a disk may hold when the power is back: where each path leads, and what is there."""

    paths: tuple[tuple[str, int], ...]
    contents: Mapping[int, Content] = field(compare=False)
    key: int = 0

    def build(self, folder: Path, modes: Mapping[int, int]) -> None:
        """Make it real."""
        folder.mkdir()
        first: dict[int, Path] = {}
        for name, inode in self.paths:
            path, content = folder / name, self.contents[inode]
            if inode in first:
                os.link(first[inode], path)
                continue
            if content is None:
                path.mkdir()
            elif isinstance(content, str):
                path.symlink_to(content)
                continue
            else:
                path.write_bytes(content)
                first[inode] = path
            path.chmod(modes[inode])


class Disk:
    """The disk while a trace is replayed: what is durable, and what is not yet."""

    def __init__(self, trace: Trace) -> None:
        self._links, self._folders = trace.links, trace.folders
        self._names = dict(trace.names)
        self._contents = dict(trace.contents)
        self._pending: list[Names] = []
        self._versions: dict[int, list[bytes]] = {}

    def copy(self) -> Disk:
        """The disk as it is now."""
        other = copy.copy(self)
        other._names, other._contents, other._pending = dict(self._names), dict(self._contents), list(self._pending)
        other._versions = {inode: list(versions) for inode, versions in self._versions.items()}
        return other

    def apply(self, event: Event) -> None:
        """One event more."""
        match event:
            case Write(inode, content):
                self._versions.setdefault(inode, []).append(content)
            case Names():
                self._pending.append(event)
            case Sync(inode) if inode in self._folders:
                self._sync_folder(inode)
            case Sync(inode):
                versions = self._versions.pop(inode, None)
                if versions:
                    self._contents[inode] = versions[-1]

    def _sync_folder(self, folder: int) -> None:
        """What became durable takes everything along that was done to the same names before."""
        taken: set[int] = set()
        keys: set[tuple[int, str]] = set()
        for number in reversed(range(len(self._pending))):
            step = self._pending[number]
            if folder in step.lasting or keys & step.changes.keys():
                taken.add(number)
                keys |= step.changes.keys()
        for number in sorted(taken):
            _change(self._names, self._pending[number])
        self._pending = [step for number, step in enumerate(self._pending) if number not in taken]

    def states(self, *, limit: int, seed: int) -> Iterator[State]:
        """Every state that a power cut may leave now, those first in which the least got lost."""
        dirty = list(self._versions)
        options = {inode: _options(self._durable(inode), self._versions[inode]) for inode in dirty}
        sizes = [2] * len(self._pending) + [len(options[inode]) for inode in dirty]
        for choice in _choices(sizes, limit, seed):
            names = dict(self._names)
            for step, lost in zip(self._pending, choice, strict=False):
                if not lost:
                    _change(names, step)
            contents = dict(self._contents)
            for inode, number in zip(dirty, choice[len(self._pending) :], strict=True):
                contents[inode] = options[inode][number]
            yield self._state(names, contents)

    def _durable(self, inode: int) -> bytes:
        content = self._contents.get(inode, b"")
        assert isinstance(content, bytes)
        return content

    def _state(self, names: dict[tuple[int, str], int], contents: dict[int, Content]) -> State:
        inside: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), inode in names.items():
            inside.setdefault(folder, []).append((name, inode))
        paths: list[tuple[str, int]] = []
        held: dict[int, Content] = {}
        todo = [("", ROOT)]
        while todo:
            prefix, folder = todo.pop()
            for name, inode in sorted(inside.get(folder, ())):
                paths.append((prefix + name, inode))
                if inode in self._folders:
                    held[inode] = None
                    todo.append((f"{prefix}{name}/", inode))
                else:
                    held[inode] = self._links.get(inode, contents.get(inode, b""))
        return State(tuple(paths), held, hash(tuple((path, held[inode]) for path, inode in paths)))


def _change(names: dict[tuple[int, str], int], step: Names) -> None:
    for key, inode in step.changes.items():
        if inode is None:
            names.pop(key, None)
        else:
            names[key] = inode


def _options(durable: bytes, versions: list[bytes]) -> list[bytes]:
    """What a file may hold of which the last version was not fsynced, all of it first."""
    new = versions[-1]
    kept = min(_shared_bytes(durable, version) for version in versions)
    middle = (kept + len(new)) // 2
    torn = [new[:middle], new[:middle] + bytes(len(new) - middle), new[:kept]]
    return list(dict.fromkeys([new, *torn, durable, *versions[:-1]]))


def _shared_bytes(one: bytes, other: bytes) -> int:
    """How many bytes at the beginning are the same."""
    if other.startswith(one) or one.startswith(other):
        return min(len(one), len(other))
    return next(place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)


def _choices(sizes: list[int], limit: int, seed: int) -> Iterator[tuple[int, ...]]:
    """For each thing that is not durable the number of what became of it; 0 is that nothing of it got lost."""
    told: set[tuple[int, ...]] = set()

    def tell(choice: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if choice not in told:
            told.add(choice)
            yield choice

    whole, nothing = tuple(0 for _ in sizes), tuple(size - 1 for size in sizes)
    yield from tell(whole)
    for place, size in enumerate(sizes):
        for number in range(1, size):
            yield from tell((*whole[:place], number, *whole[place + 1 :]))
    for place in range(len(sizes)):
        yield from tell((*nothing[:place], 0, *nothing[place + 1 :]))
    yield from tell(nothing)
    if math.prod(sizes) <= limit:
        for choice in itertools.product(*(range(size) for size in sizes)):
            yield from tell(choice)
        return
    draw = random.Random(seed)
    for _ in range(limit // 10):
        yield from tell(tuple(draw.randrange(size) for size in sizes))


# --- exploring


@dataclass(frozen=True)
class Violation:
    """A state that breaks what was promised."""

    moment: int
    """Number of the event before which the power was cut."""
    reason: str

    def __str__(self) -> str:
        return f"power cut before event {self.moment}: {self.reason}"


class Explorer:
    """Builds the crash states of a trace and shows each to ``check(folder, promised)``, which raises when it finds a fault.

    A verdict depends on the state and the promise only, and is kept: traces with and without an fsync share most states.
    """

    def __init__(self, name: str, trace: Trace, check: Callable[[Path, object], None], scratch: Path) -> None:
        self.name, self.trace = name, trace
        self._check, self._scratch = check, scratch
        self._verdicts: dict[tuple[int, int], str] = {}
        self._promises: list[object] = []

    @property
    def state_count(self) -> int:
        """Different states that were built and checked, with different promises."""
        return len(self._verdicts)

    def violations(self, *, without: Site | None = None) -> Iterator[Violation]:
        """Go through the states, as if one fsync had been forgotten; then from the end on, where it is missed most."""
        limit = ALL_STATES if without is None else SOME_STATES
        moments = self._moments(without)
        for number, disk, promised in moments if without is None else reversed(list(moments)):
            for state in disk.states(limit=limit, seed=number):
                if reason := self._verdict(state, promised):
                    yield Violation(number, reason)

    def _moments(self, without: Site | None) -> Iterator[tuple[int, Disk, object]]:
        """When the power may be cut: the number of the event that does not happen any more, the disk, what was promised."""
        disk, promised = Disk(self.trace), self.trace.promised
        for number, event in enumerate(self.trace.events):
            if isinstance(event, Sync) and event.site == without:
                continue
            if isinstance(event, Sync | Promise):
                yield number, disk.copy(), promised
            if isinstance(event, Promise):
                promised = event.value
            else:
                disk.apply(event)
        yield len(self.trace.events), disk, promised

    def _verdict(self, state: State, promised: object) -> str:
        if promised not in self._promises:
            self._promises.append(promised)
        key = state.key, self._promises.index(promised)
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(state, promised)
        return self._verdicts[key]

    def _judge(self, state: State, promised: object) -> str:
        folder = self._scratch / "state"
        state.build(folder, self.trace.modes)
        try:
            with no_fsync():
                self._check(folder, promised)
        except Exception as error:  # noqa: BLE001 - whatever the reading code stumbles over is what is looked for
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(folder)
        return ""


@contextlib.contextmanager
def no_fsync() -> Iterator[None]:
    """The states are looked at and thrown away: waiting for a disk would show nothing."""
    os.fsync = os.fdatasync = lambda _descriptor: None
    try:
        yield
    finally:
        os.fsync, os.fdatasync = _real["fsync"], _real["fdatasync"]


def survivors(explorers: list[Explorer], *, redundant: Collection[str] = ()) -> dict[str, Site]:
    """The fsyncs that can be forgotten without a violation in any of the traces, by label.

    Args:
        explorers: of the traces, the cheapest first.
        redundant: how the labels of those begin that are not tried.

    Raises:
        AssertionError: no trace has such a label.
    """
    sites = {site.label: site for explorer in explorers for site in explorer.trace.sites}
    unknown = {start for start in redundant if not any(label.startswith(start) for label in sites)}
    assert not unknown, f"not called any more: {unknown}"
    left = {label: site for label, site in sites.items() if not label.startswith(tuple(redundant))}
    for explorer in explorers:
        for site in explorer.trace.sites:
            if site.label in left and any(explorer.violations(without=site)):
                del left[site.label]
    return left
