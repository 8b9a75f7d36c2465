"""Give inputs to a target, and keep what must not happen: a foreign exception, a broken claim, too long, too much memory.

``Examiner`` counts and measures; it never raises for what an input did, so that a run of a million goes on after the first
finding. Findings with the same place are one, and the smallest input of each is kept.
"""

from __future__ import annotations

import gc
import hashlib
import mmap
import resource
import time
import traceback
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzzing.targets import Target

MAX_SECONDS = 1.0
"""Processor time for one input."""
MAX_TRACED_BYTES = 96 << 20
"""What Python and its C modules may allocate for one input, of those that are looked at."""
MAX_GROWTH_BYTES = 1 << 30
"""Address space of the whole process above what it had when it was ready: more raises MemoryError, which is a finding."""
TRACED_EACH = 64
"""One in so many inputs is run under tracemalloc."""
CHUNK = 10_000
PROGRAMS = st.binary(min_size=12, max_size=48)
"""What hypothesis draws: programs of ``edgekit``'s mutations."""


class Figures(msgspec.Struct):
    """What a run did, all its parts together."""

    target: str
    engine: str
    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    largest_traced_bytes: int = 0
    rss_before_mb: float = 0.0
    rss_peak_mb: float = 0.0
    parts: int = 0
    """How often the run was begun or gone on with; the seeds differ."""
    findings: dict[str, str] = {}
    """Kind and place to the last lines of the traceback."""


def rss_peak_mb() -> float:
    """The process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def limit_memory(growth: int = MAX_GROWTH_BYTES) -> None:
    """Let the address space grow by so many bytes and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + growth
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


class LastInput:
    """The input that is being tried, in a file: it survives a process that a C library brings down."""

    def __init__(self, path: Path, *, size: int = 1 << 20) -> None:
        path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)

    def keep(self, data: bytes) -> None:
        """Note it."""
        piece = data[: len(self._map) - 8]
        self._map[: 8 + len(piece)] = len(piece).to_bytes(8, "little") + piece

    @staticmethod
    def read(path: Path) -> bytes:
        """What was noted last."""
        data = path.read_bytes()
        return data[8 : 8 + int.from_bytes(data[:8], "little")]


@dataclass
class Examiner:
    """Runs one target."""

    target: Target
    figures: Figures
    folder: Path | None = None
    last: LastInput | None = None
    _sizes: dict[str, int] = field(default_factory=dict)

    def examine(self, data: bytes) -> None:
        """Run one input and judge it."""
        if self.last is not None:
            self.last.keep(data)
        self.figures.inputs += 1
        is_traced = self.figures.inputs % TRACED_EACH == 0
        if is_traced:
            tracemalloc.start()
        gc.disable()  # an engine's garbage is not the input's time
        began = time.thread_time()
        try:
            self.figures.accepted += self.target.run(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
            self._keep(_place(error), "".join(traceback.format_exception(error)[-4:]), data)
        spent = time.thread_time() - began
        gc.enable()
        if is_traced:
            self._judge_memory(data)
        else:
            self._judge_time(spent, data)

    def _judge_time(self, spent: float, data: bytes) -> None:
        self.figures.slowest_s = max(self.figures.slowest_s, spent)
        if spent > MAX_SECONDS:
            self._keep("slow", f"{spent:.2f} s of processor time", data)

    def _judge_memory(self, data: bytes) -> None:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.figures.largest_traced_bytes = max(self.figures.largest_traced_bytes, peak)
        if peak > MAX_TRACED_BYTES:
            self._keep("memory", f"{peak} bytes allocated", data)

    def _keep(self, place: str, text: str, data: bytes) -> None:
        self.figures.findings.setdefault(place, text)
        if self.folder is None or self._sizes.get(place, len(data) + 1) <= len(data):
            return
        self._sizes[place] = len(data)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(place.encode(errors="replace")).hexdigest()[:12]
        (self.folder / f"{name}.bin").write_bytes(data)
        (self.folder / f"{name}.txt").write_text(f"{self.target.name}: {place}\n\n{text}", errors="replace")


def _place(error: BaseException) -> str:
    """The kind of an error, and where it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/edgekit/" in frame.filename]
    where = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(where.filename).name}:{where.name}"


def draw(examiner: Examiner, count: int, *, number: int) -> None:
    """Let hypothesis draw ``count`` programs; the same number draws the same ones."""

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(program=PROGRAMS)
    def one(program: bytes) -> None:
        examiner.examine(examiner.target.make(program))

    one()
