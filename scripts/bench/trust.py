#!/usr/bin/env python
"""What trust costs: publishing beside hashing, a refresh on the wire, verification beside plain SHA-256.

    python scripts/bench/trust.py [--size-mb 100] [--rounds 7] [--folder DIR]

Publishing writes to the disk below ``--folder`` (default: a temporary one) and is timed with its fsyncs; hashing reads the same
bundle in 1 MB chunks. The two alternate, and medians are given with the range. The refresh is counted by a proxy on loopback,
headers and both directions; TCP and TLS are not in it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from releases import tiny_bundle

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


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def row(name: str, ours: list[float], plain: list[float], *, is_rate: bool) -> None:
    """Medians, ranges and their ratio."""
    ratios = [b / a if is_rate else a / b for a, b in zip(ours, plain, strict=True)]
    middle = statistics.median(ratios)
    print(
        f"{name:<34} {statistics.median(ours) * 1000:8.1f} ms   plain {statistics.median(plain) * 1000:8.1f} ms   "
        f"{'throughput' if is_rate else 'time'} ratio {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


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


def count_refresh(repository: Path, folder: Path, releases: int) -> None:
    """Bytes of a first refresh, and of one when nothing changed."""
    root = (repository / "metadata" / "1.root.json").read_bytes()
    floors = Floors()
    with RepositoryServer(repository, "127.0.0.1", 0) as server:
        for name in ("first", "nothing changed"):
            counter = Counter(server.server_address[1])
            device = TrustedRepository(folder / "cache", counter.url, root=root, floors=floors, now=datetime.now(UTC))
            floors = device.refresh().floors
            total = counter.sent + counter.received
            parts = f"{counter.sent} up, {counter.received} down"
            print(f"refresh, {name:<22} {total:6d} B on the wire ({parts}), {releases} release(s)")


def main() -> None:
    """Everything, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as text:
        folder = Path(text)
        repository, signer = folder / "repository", generate_signer()
        init_repository(repository, keys_dir=folder / "keys")
        bundle = tiny_bundle(folder / "model.edgekit", signer, model=os.urandom(options.size_mb * 1_000_000))
        blob = max(verify_bundle(bundle, [signer.public_key]).manifest.blobs, key=lambda ref: ref.size_bytes)
        plain, published, verified, opened = [], [], [], []
        for _ in range(options.rounds):
            (repository / blob_name(blob.digest)).unlink(missing_ok=True)
            plain.append(seconds(lambda: hash_file(bundle)))
            published.append(seconds(lambda: publish(repository, bundle, keys=[signer.public_key], is_again=True)))
            verified.append(seconds(lambda: verify_bundle(bundle, [signer.public_key])))
            hash_file(repository / blob_name(blob.digest))  # publishing gave its cached pages back to the system
            opened.append(seconds(lambda: os.close(open_blob(repository / blob_name(blob.digest), blob.digest))))
        print(f"{options.size_mb} MB, {options.rounds} rounds, alternating")
        row("publish, with fsync", published, plain, is_rate=False)
        row("bundle verify", verified, plain, is_rate=True)
        row("verify on load (open descriptor)", opened, plain, is_rate=True)
        count_refresh(repository, folder, 1)


if __name__ == "__main__":
    main()
