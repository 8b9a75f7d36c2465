"""The job folder of ``edgekit recalibrate``: what is finished is kept, and the same command goes on after it.

A stage is finished under a key, the digest of everything that decides its result. Run again with the same key it is skipped;
with another one it and, since their keys hold its result, all that follow are done anew.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     job = Job.open(Path(folder) / "job", name="kws", since_ms=0, now_ms=1)
...     job.run("check", ["a"], lambda: "3 samples", now_ms=2)
...     job.run("check", ["a"], lambda: "never asked", now_ms=3)
'3 samples'
'3 samples'
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.errors import ArtifactError, UsageError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.digest import digest_bytes
from edgekit.schema.recalibration import JobRecord, StageName, StageNote

JOB_FILE = "job.json"
_PRIVATE_FOLDER = 0o700


class Job:
    """A job in its folder."""

    def __init__(self, folder: Path, record: JobRecord) -> None:
        self.folder, self.record = folder, record

    @classmethod
    def open(cls, folder: Path, *, name: str, since_ms: int, now_ms: int, order: int = 0, worker: str = "") -> Job:
        """Begin a job, or go on with the one in this folder.

        Raises:
            UsageError: ``recalibrate.folder`` when the folder holds something else, or a job of another model or order.
        """
        path = folder / JOB_FILE
        fresh = JobRecord(name=name, since_ms=since_ms, started_ms=now_ms, order=order, worker=worker)
        if not path.is_file():
            if folder.exists() and any(folder.iterdir()):
                raise UsageError("recalibrate.folder", f"{folder}: holds other files.", hint="Give a new folder by --out.")
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(_PRIVATE_FOLDER)
            job = cls(folder, fresh)
            job.save(fresh)
            return job
        try:
            known = decode_json(path.read_bytes(), JobRecord, name=str(path))
        except (OSError, ArtifactError) as error:
            raise UsageError("recalibrate.folder", f"{path}: {error}", hint="Give a new folder by --out.") from error
        if known.name != name or (order and known.order != order):
            what = f"{known.name}{f', order {known.order}' if known.order else ''}"
            raise UsageError("recalibrate.folder", f"{folder}: is the job of {what}.", hint="Give a new folder by --out.")
        return cls(folder, known)

    def save(self, record: JobRecord) -> None:
        """Write the record down."""
        write_durably(self.folder / JOB_FILE, encode_json(record), mode=PRIVATE_FILE)
        self.record = record

    def find(self, stage: StageName) -> StageNote | None:
        """The stage as it was finished last."""
        return next((note for note in self.record.stages if note.name == stage), None)

    def is_done(self, stage: StageName, key: Sequence[object]) -> bool:
        """Whether it was finished under this key."""
        known = self.find(stage)
        return known is not None and known.key == _digest(key)

    def run(self, stage: StageName, key: Sequence[object], work: Callable[[], str], *, now_ms: int) -> str:
        """Do a stage unless it is done; what it says of itself.

        Args:
            stage: its name.
            key: what decides its result.
            work: does it; its results lie in the folder before it returns.
            now_ms: Unix time in milliseconds.
        """
        if self.is_done(stage, key):
            known = self.find(stage)
            assert known is not None
            return known.text
        started = time.monotonic()
        text = work()
        self.note(stage, key, text, seconds=time.monotonic() - started, now_ms=now_ms)
        return text

    def note(self, stage: StageName, key: Sequence[object], text: str, *, seconds: float, now_ms: int) -> None:
        """A stage is finished."""
        made = StageNote(name=stage, key=_digest(key), text=text, seconds=round(seconds, 2), finished_ms=now_ms)
        others = tuple(note for note in self.record.stages if note.name != stage)
        self.save(msgspec.structs.replace(self.record, stages=(*others, made)))

    def forget(self, stage: StageName) -> None:
        """Its result is gone: it is to be done again."""
        self.save(msgspec.structs.replace(self.record, stages=tuple(note for note in self.record.stages if note.name != stage)))


def _digest(key: Sequence[object]) -> str:
    return digest_bytes(repr(list(key)).encode())
