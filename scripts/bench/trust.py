#!/usr/bin/env python
"""What trust costs: publishing beside hashing, a refresh on the wire, verification beside plain SHA-256.

    python scripts/bench/trust.py [--size-mb 100] [--rounds 7] [--folder DIR] [--json]

Publishing writes to the disk below ``--folder`` (default: a temporary one) and is timed with its fsyncs; hashing reads the same
bundle in 1 MB chunks. All of them alternate, and medians of the ratio to the hashing of the same round are given with their
range. Ratios are of the wall clock and of the processor time of all threads: the first supposes a second core that is free, the
second does not depend on what else runs; ``busy`` is how much of the machine others took meanwhile. The refresh is counted by a
proxy on loopback, headers and both directions; TCP and TLS are not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from releases import tiny_bundle

from edgekit import __version__
from edgekit.agent.slots import SlotStore
from edgekit.agent.worker import open_blob
from edgekit.bundle.layout import blob_name
from edgekit.bundle.reader import verify_bundle
from edgekit.repository.ceremony import init_repository
from edgekit.repository.publishing import publish
from edgekit.repository.server import RepositoryServer
from edgekit.schema.digest import CHUNK_BYTES
from edgekit.schema.state import Floors
from edgekit.trust.repository_client import TrustedRepository
from edgekit.trust.signer import generate_signer


def hash_file(path: Path) -> None:
    """Plain SHA-256, in chunks."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            state.update(chunk)


@dataclass(frozen=True)
class Took:
    """One run: seconds by the wall clock, and of the processor in all threads."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], object]) -> Took:
    """Run it once."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


@contextlib.contextmanager
def fsyncs(found: list[float]) -> Iterator[None]:
    """What ``os.fsync`` takes inside, in all, appended to ``found``."""
    real, spent = os.fsync, [0.0]

    def watched(descriptor: int) -> None:
        started = time.perf_counter()
        real(descriptor)
        spent[0] += time.perf_counter() - started

    os.fsync = watched  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = real
        found.append(spent[0])


def machine_seconds() -> float:
    """Processor seconds that the whole machine has spent so far, waiting for disks apart."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def compare(ours: list[Took], plain: list[Took], *, is_rate: bool) -> dict[str, Any]:
    """Ours beside hashing, round by round: as a part of its throughput, or as a multiple of its time."""
    found: dict[str, Any] = {"kind": "throughput" if is_rate else "time", "ms": spread([took.wall_s * 1000 for took in ours])}
    for clock in ("wall", "cpu"):
        pairs = [(getattr(a, f"{clock}_s"), getattr(b, f"{clock}_s")) for a, b in zip(ours, plain, strict=True)]
        found[clock] = spread([b / a if is_rate else a / b for a, b in pairs])
    return found


class Counter:
    """A TCP proxy that counts what passes."""

    def __init__(self, port: int) -> None:
        self.port, self.sent, self.received = port, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            outer, _ = self.listener.accept()
            inner = socket.create_connection(("127.0.0.1", self.port))
            threading.Thread(target=self._pump, args=(outer, inner, "sent"), daemon=True).start()
            threading.Thread(target=self._pump, args=(inner, outer, "received"), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        while data := source.recv(65536):
            setattr(self, name, getattr(self, name) + len(data))
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def count_refresh(repository: Path, folder: Path) -> dict[str, Any]:
    """Bytes of a first refresh, and of one when nothing changed."""
    root = (repository / "metadata" / "1.root.json").read_bytes()
    floors, found = Floors(), {}
    with RepositoryServer(repository, "127.0.0.1", 0) as server:
        for name in ("first", "nothing changed"):
            counter = Counter(server.server_address[1])
            device = TrustedRepository(folder / "cache", counter.url, root=root, floors=floors, now=datetime.now(UTC))
            floors = device.refresh().floors
            found[name] = {"up": counter.sent, "down": counter.received, "bytes": counter.sent + counter.received}
    return found


def measure(folder: Path, size_mb: int, rounds: int) -> dict[str, Any]:
    """Everything."""
    repository, signer = folder / "repository", generate_signer()
    init_repository(repository, keys_dir=folder / "keys")
    bundle = tiny_bundle(folder / "model.edgekit", signer, model=os.urandom(size_mb * 1_000_000))
    blob = max(verify_bundle(bundle, [signer.public_key]).manifest.blobs, key=lambda ref: ref.size_bytes)
    stored, slots = repository / blob_name(blob.digest), SlotStore(folder)
    in_slot = slots.blob("a", blob.digest)
    in_slot.parent.mkdir(parents=True)
    found: dict[str, list[Took]] = defaultdict(list)
    synced: list[float] = []
    started, busy, own = time.monotonic(), machine_seconds(), time.process_time()
    for _ in range(rounds):
        stored.unlink(missing_ok=True)
        in_slot.unlink(missing_ok=True)
        hash_file(bundle)  # into the page cache
        found["plain"].append(timed(lambda: hash_file(bundle)))
        with fsyncs(synced):
            found["publish"].append(timed(lambda: publish(repository, bundle, keys=[signer.public_key], is_again=True)))
        found["bundle"].append(timed(lambda: verify_bundle(bundle, [signer.public_key])))
        os.link(stored, in_slot)
        hash_file(stored)  # publishing gave its cached pages back to the system
        found["plain blob"].append(timed(lambda: hash_file(stored)))
        found["slot"].append(timed(lambda: slots.verify("a", [blob])))
        found["load"].append(timed(lambda: os.close(open_blob(stored, blob.digest))))
    spent = machine_seconds() - busy - (time.process_time() - own)
    return {
        "busy": spent / (time.monotonic() - started) / (os.cpu_count() or 1),
        "plain_ms": spread([took.wall_s * 1000 for took in found["plain"]]),
        "publish": compare(found["publish"], found["plain"], is_rate=False),
        "fsync_ms": spread([seconds * 1000 for seconds in synced]),
        "bundle verify": compare(found["bundle"], found["plain"], is_rate=True),
        "slot verify": compare(found["slot"], found["plain blob"], is_rate=True),
        "verify on load": compare(found["load"], found["plain blob"], is_rate=True),
        "refresh": count_refresh(repository, folder),
    }


def show(found: dict[str, Any]) -> None:
    """As a table."""
    print(f"{found['size_mb']} MB, {found['rounds']} rounds, alternating; others took {found['busy']:.0%} of the machine")
    print(f"hashing alone {found['plain_ms']['median']:.1f} ms; fsyncs of a publish {found['fsync_ms']['median']:.1f} ms")
    for name in ("publish", "bundle verify", "slot verify", "verify on load"):
        row = found[name]
        wall, cpu = (
            f"{row[clock]['median']:.2f} ({row[clock]['least']:.2f} to {row[clock]['most']:.2f})" for clock in ("wall", "cpu")
        )
        print(f"{name:<16} {row['ms']['median']:8.1f} ms   {row['kind']:<10} ratio {wall:<20} of the processor {cpu}")
    for name, row in found["refresh"].items():
        print(f"refresh, {name:<16} {row['bytes']:6d} B on the wire ({row['up']} up, {row['down']} down)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    head = {"edgekit": __version__, "machine": os.uname().machine, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = head | {"size_mb": options.size_mb, "rounds": options.rounds}
        found |= measure(Path(folder), options.size_mb, options.rounds)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


if __name__ == "__main__":
    main()
