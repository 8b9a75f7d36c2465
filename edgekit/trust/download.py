"""Download a blob, or any file whose digest is signed: resumable, bounded, verified before it gets its name.

``<part_dir>/<hex>.part`` is what came so far, ``<part_dir>/<hex>`` is complete, verified and durable. The digest is computed
over the part that is resumed, too: a damaged part costs a new download, never wrong bytes. A full disk leaves nothing behind.

    >>> path = download_blob("http://127.0.0.1:8600", ref, Path("staging"))  # doctest: +SKIP
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

from edgekit.durable import make_folder, sync_folder
from edgekit.errors import DeviceError, EdgekitError, TrustError
from edgekit.schema.digest import CHUNK_BYTES, hex_of
from edgekit.schema.manifest import BlobRef
from edgekit.trust.repository_client import repository_error
from edgekit.trust.transport import Answer, Transport, TransportError, TransportOptions

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with bytes that are here and bytes in all."""
Algorithm = Literal["sha256", "sha512"]
SYNC_BYTES = 8 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z")
_RETRIED = frozenset({"cut", "slow", "unreachable"})


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary program may still write into a folder."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def download_blob(
    base_url: str,
    ref: BlobRef,
    part_dir: Path,
    *,
    on_progress: Progress | None = None,
    options: TransportOptions | None = None,
    attempts: int = 3,
    retry_s: float = 0.5,
) -> Path:
    """Fetch ``<base_url>/blobs/sha256/<hex>``, going on where an earlier call stopped.

    Args:
        base_url: of the repository.
        ref: digest and size, from signed metadata.
        part_dir: where the part and the blob lie; made where missing.
        on_progress: told about progress.
        options: time-outs, minimum rate, TLS files.
        attempts: requests in a row that may break without a new byte.
        retry_s: pause before another request.

    Returns:
        The verified file ``part_dir/<hex>``.

    Raises:
        RepositoryError: ``repository.unreachable``, ``repository.not_found``, ``repository.slow``; what came is kept.
        TrustError: ``trust.digest`` or ``trust.length``; what came is removed.
        DeviceError: ``device.disk_full`` with the bytes needed and free (what came is removed), or ``device.storage``.
    """
    wanted = SignedFile(
        url=f"{base_url.rstrip('/')}/blobs/sha256/{hex_of(ref.digest)}",
        name=ref.path,
        size_bytes=ref.size_bytes,
        digest_hex=hex_of(ref.digest),
    )
    transport = Transport(options)
    try:
        return download_file(wanted, part_dir, transport=transport, on_progress=on_progress, attempts=attempts, retry_s=retry_s)
    finally:
        transport.close()


@dataclass(frozen=True, kw_only=True)
class SignedFile:
    """Where a file is, and what signed metadata says of it."""

    url: str
    name: str
    """For messages."""
    size_bytes: int
    digest_hex: str
    """Lower-case hex digits; the file lies under this name."""
    algorithm: Algorithm = "sha256"


def download_file(
    wanted: SignedFile,
    part_dir: Path,
    *,
    transport: Transport,
    on_progress: Progress | None = None,
    attempts: int = 3,
    retry_s: float = 0.5,
) -> Path:
    """Fetch a file, going on where an earlier call stopped; arguments, result and errors as :func:`download_blob`."""
    job = _Job(wanted=wanted, part_dir=part_dir, on_progress=on_progress)
    try:
        make_folder(part_dir)
        if job.final.is_file():
            if _digest_of(job) == wanted.digest_hex:
                return job.final
            job.final.unlink()
        _fetch(job, transport, attempts, retry_s)
        return _finish(job)
    except OSError as error:
        _raise_storage(error, job)


@dataclass
class _Job:
    wanted: SignedFile
    part_dir: Path
    on_progress: Progress | None

    @property
    def url(self) -> str:
        return self.wanted.url

    @property
    def final(self) -> Path:
        return self.part_dir / self.wanted.digest_hex

    @property
    def part(self) -> Path:
        return self.part_dir / f"{self.wanted.digest_hex}.part"

    @property
    def part_bytes(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def tell(self, done: int) -> None:
        if self.on_progress is not None:
            self.on_progress(done, self.wanted.size_bytes)

    def hash(self) -> hashlib._Hash:
        """A new state of the algorithm that the digest is of."""
        return hashlib.new(self.wanted.algorithm)


def _digest_of(job: _Job) -> str:
    with job.final.open("rb") as file:
        return hashlib.file_digest(file, job.hash).hexdigest()


def _fetch(job: _Job, transport: Transport, attempts: int, retry_s: float) -> None:
    """Until the part is complete and its digest is right."""
    failures, started = 0, time.monotonic()
    first = before = job.part_bytes
    while True:
        try:
            _attempt(job, transport)
        except TransportError as error:
            after = job.part_bytes
            failures = 0 if after > before and error.fault != "slow" else failures + 1
            if error.fault == "too_long":
                job.part.unlink(missing_ok=True)
            if error.fault not in _RETRIED or failures >= attempts or _is_too_slow(transport, started, after - first):
                raise repository_error(error) from error
            logger.info("download interrupted, going on: url=%s bytes=%d reason=%s", job.url, after, error)
            before = after
            time.sleep(retry_s)
        else:
            return


def _is_too_slow(transport: Transport, started: float, received: int) -> bool:
    """The minimum rate over all requests together: a server that cuts after every byte is slow, too."""
    spent, options = time.monotonic() - started, transport.options
    return spent > options.grace_s and received < spent * options.min_bytes_per_s


def _attempt(job: _Job, transport: Transport) -> None:
    """One request: append to the part, or begin again where the part or the server does not allow it."""
    with _open_part(job.part) as file:
        state, done = job.hash(), 0
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)
            done += len(chunk)
        size, is_resumed = job.wanted.size_bytes, done > 0
        if done > size:
            state, done = _restart(job, file)
        _check_space(job, size - done)
        if done < size or size == 0:
            with _ask(job, transport, done) as answer:
                if done and not _is_rest(answer, done, size):
                    logger.info("server does not resume, beginning again: url=%s status=%d", job.url, answer.status)
                    state, done = _restart(job, file)
                    if answer.status != 200:
                        raise TransportError("cut", f"{job.url}: the range that was sent is not the one asked for")
                done = _append(job, file, answer, state, done)
        _sync(file)
        if done < size:
            raise TransportError("cut", f"{job.url}: {done} of {size} bytes came")
        if state.hexdigest() != job.wanted.digest_hex:
            _wrong_digest(job, file, state.hexdigest(), is_resumed=is_resumed)


def _ask(job: _Job, transport: Transport, done: int) -> Answer:
    ok = frozenset({200, 206, 416}) if done else frozenset({200})
    return transport.get(job.url, headers={"Range": f"bytes={done}-"} if done else None, ok=ok)


def _is_rest(answer: Answer, done: int, size: int) -> bool:
    """Whether the answer is the bytes from ``done`` to the end."""
    match = _CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
    if answer.status != 206 or match is None:
        return False
    first, last, total = match.groups()
    return int(first) == done and int(last) == size - 1 and total in {"*", str(size)}


def _append(job: _Job, file: BinaryIO, answer: Answer, state: hashlib._Hash, done: int) -> int:
    unsynced = 0
    for chunk in answer.chunks(max_bytes=job.wanted.size_bytes - done):
        _write_all(file, chunk)
        state.update(chunk)
        done += len(chunk)
        unsynced += len(chunk)
        if unsynced >= SYNC_BYTES:
            _sync(file)
            unsynced = 0
        job.tell(done)
    return done


def _wrong_digest(job: _Job, file: BinaryIO, found: str, *, is_resumed: bool) -> NoReturn:
    """A resumed part may have been damaged: once more from the start; then it is the server's bytes."""
    _restart(job, file)
    if is_resumed:
        raise TransportError("cut", f"{job.url}: what came does not have the digest")
    job.part.unlink(missing_ok=True)
    raise TrustError(
        "trust.digest",
        f"{job.url}: the bytes have {job.wanted.algorithm}:{found[:12]}…, what was signed has {job.wanted.digest_hex[:12]}….",
        hint="They were changed on the way or on the server; publish them again.",
    )


def _restart(job: _Job, file: BinaryIO) -> tuple[hashlib._Hash, int]:
    file.seek(0)
    file.truncate()
    return job.hash(), 0


def _open_part(path: Path) -> BinaryIO:
    """Open for reading and writing; unbuffered, so that a full disk shows in the write that hits it."""
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    file = os.fdopen(descriptor, "r+b", buffering=0)
    if is_new:
        sync_folder(path.parent)  # what is fsynced of a file without a name is lost
    return file


def _write_all(file: BinaryIO, data: bytes) -> None:
    """A write on a nearly full disk may take a part only; the next one then says why."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _sync(file: BinaryIO) -> None:
    os.fsync(file.fileno())


def _check_space(job: _Job, needed: int) -> None:
    if needed > free_bytes(job.part_dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _finish(job: _Job) -> Path:
    job.part.replace(job.final)
    sync_folder(job.part_dir)
    job.tell(job.wanted.size_bytes)
    return job.final


def _raise_storage(error: OSError, job: _Job) -> NoReturn:
    raise _storage_error(error, job) from error


def _storage_error(error: OSError, job: _Job) -> EdgekitError:
    if error.errno in _FULL:
        job.part.unlink(missing_ok=True)
        free = free_bytes(job.part_dir)
        return DeviceError(
            "device.disk_full",
            f"{job.part_dir}: {job.wanted.name} needs {job.wanted.size_bytes} bytes, {free} are free.",
            hint="Free some space; the model that runs now is not touched.",
        )
    return DeviceError("device.storage", f"{job.part_dir}: cannot write {job.wanted.name}: {error.strerror or error}.")
