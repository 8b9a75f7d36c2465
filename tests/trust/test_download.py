"""The blob download against real servers on loopback that behave, cut, lie and drip."""

from __future__ import annotations

import errno
import os
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import DeviceError, RepositoryError, TrustError
from edgekit.repository.server import RepositoryServer
from edgekit.schema.digest import digest_bytes, hex_of
from edgekit.schema.manifest import BlobRef
from edgekit.trust import download as download_module
from edgekit.trust.download import download_blob
from edgekit.trust.transport import TransportOptions

DATA = random.Random(7).randbytes(300_000)
REF = BlobRef(path="model.onnx", role="model", digest=digest_bytes(DATA), size_bytes=len(DATA))
QUICK = TransportOptions(connect_timeout_s=2, read_timeout_s=0.5, headers_timeout_s=1, grace_s=0.3, min_bytes_per_s=2000)


class Peer(ThreadingHTTPServer):
    """Serves DATA through ``behave(handler, first, has_range)``; counts requests and bytes."""

    daemon_threads = True

    def __init__(self, behave):
        self.behave, self.requests, self.sent = behave, [], 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        text = self.headers.get("Range")
        first = int(text.removeprefix("bytes=").rstrip("-")) if text else 0
        self.server.requests.append(text)
        self.server.behave(self, first, text is not None)

    def reply(self, status, body, *, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.server.sent += len(body)

    def log_message(self, *_):
        pass


def rest(handler, first, has_range, data=DATA, limit=None):
    """A correct answer, cut after ``limit`` bytes."""
    body = data[first:]
    headers = {"Content_Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if has_range else {}
    handler.reply(206 if has_range else 200, body[:limit], length=len(body), **headers)


def fetch(url, folder, **changes):
    arguments = {"options": QUICK, "retry_s": 0.01} | changes
    return download_blob(url, REF, folder, **arguments)


def left(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def test_download_from_our_server(tmp_path):
    repo = tmp_path / "repo"
    (repo / "metadata").mkdir(parents=True)
    (repo / "blobs" / "sha256").mkdir(parents=True)
    (repo / "blobs" / "sha256" / hex_of(REF.digest)).write_bytes(DATA)
    seen = []
    with RepositoryServer(repo, "127.0.0.1", 0) as server:
        path = fetch(server.url, tmp_path / "in", on_progress=lambda done, total: seen.append((done, total)))
        (tmp_path / "in2").mkdir()
        (tmp_path / "in2" / f"{hex_of(REF.digest)}.part").write_bytes(DATA[:1000])
        assert fetch(server.url, tmp_path / "in2").read_bytes() == DATA
    assert path.read_bytes() == DATA
    assert left(tmp_path / "in") == [hex_of(REF.digest)]
    assert seen[-1] == (len(DATA), len(DATA))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_complete_file_is_not_fetched_again(tmp_path):
    with Peer(rest) as peer:
        fetch(peer.url, tmp_path)
        fetch(peer.url, tmp_path)
        assert len(peer.requests) == 1
        (tmp_path / hex_of(REF.digest)).write_bytes(DATA[:-1] + b"x")
        assert fetch(peer.url, tmp_path).read_bytes() == DATA


@pytest.mark.fault("F5")
def test_link_cut_again_and_again_transfers_each_byte_once(tmp_path):
    with Peer(lambda h, first, r: rest(h, first, r, limit=70_000)) as peer:
        assert fetch(peer.url, tmp_path).read_bytes() == DATA
        assert peer.sent == len(DATA)
        assert len(peer.requests) == 5


@pytest.mark.fault("F5")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 120_000), max_size=5))
def test_cuts_anywhere_give_the_right_bytes(tmp_path_factory, cuts):
    limits = iter(cuts)
    folder = tmp_path_factory.mktemp("cuts")
    with Peer(lambda h, first, r: rest(h, first, r, limit=next(limits, None))) as peer:
        assert fetch(peer.url, folder).read_bytes() == DATA
        assert peer.sent == len(DATA)


@pytest.mark.fault("F5")
def test_resumes_in_another_process_run(tmp_path):
    def once(handler, first, has_range):
        rest(handler, first, has_range, limit=0 if has_range else 100_000)

    with Peer(once) as peer, pytest.raises(RepositoryError):
        fetch(peer.url, tmp_path)
    assert left(tmp_path) == [f"{hex_of(REF.digest)}.part"]
    with Peer(rest) as peer:
        assert fetch(peer.url, tmp_path).read_bytes() == DATA
        assert peer.requests == ["bytes=100000-"]


@pytest.mark.fault("F5")
@pytest.mark.parametrize("part", [b"x" * 1000, DATA[:500] + b"x" + DATA[501:1000], DATA + b"more", b"\0" * len(DATA), DATA])
def test_part_that_is_damaged_too_long_or_complete(tmp_path, part):
    (tmp_path / f"{hex_of(REF.digest)}.part").write_bytes(part)
    with Peer(rest) as peer:
        assert fetch(peer.url, tmp_path).read_bytes() == DATA
        assert len(peer.requests) <= 2


def ignores_range(handler, first, has_range):
    handler.reply(200, DATA)


def wrong_range(handler, first, has_range):
    if not has_range:
        rest(handler, 0, has_range=False)
    else:
        handler.reply(206, DATA[first - 10 :], Content_Range=f"bytes {first - 10}-{len(DATA) - 1}/{len(DATA)}")


def no_content_range(handler, first, has_range):
    if not has_range:
        rest(handler, 0, has_range=False)
    else:
        handler.reply(206, DATA[first:])


def other_total(handler, first, has_range):
    if not has_range:
        rest(handler, 0, has_range=False)
    else:
        handler.reply(206, DATA[first:], Content_Range=f"bytes {first}-{len(DATA) - 1}/{len(DATA) + 5}")


def unsatisfiable(handler, first, has_range):
    if not has_range:
        rest(handler, 0, has_range=False)
    else:
        handler.reply(416, b"", Content_Range=f"bytes */{len(DATA)}")


@pytest.mark.fault("F6")
@pytest.mark.parametrize("behave", [ignores_range, wrong_range, no_content_range, other_total, unsatisfiable])
def test_server_that_does_not_resume_never_mixes_bytes(tmp_path, behave):
    (tmp_path / f"{hex_of(REF.digest)}.part").write_bytes(DATA[:1000])
    with Peer(behave) as peer:
        assert fetch(peer.url, tmp_path).read_bytes() == DATA


@pytest.mark.fault("F7")
def test_other_bytes_of_the_same_length(tmp_path):
    wrong = DATA[:-1] + bytes([DATA[-1] ^ 1])
    with Peer(lambda h, first, r: rest(h, first, r, data=wrong)) as peer:
        with pytest.raises(TrustError) as caught:
            fetch(peer.url, tmp_path)
        assert len(peer.requests) == 1
    assert caught.value.code == "trust.digest"
    assert left(tmp_path) == []


def endless(handler, first, has_range):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(DATA)
        handler.server.sent += len(DATA)


@pytest.mark.fault("F7")
def test_endless_body_is_bounded(tmp_path):
    with Peer(endless) as peer:
        with pytest.raises(TrustError) as caught:
            fetch(peer.url, tmp_path)
        assert caught.value.code == "trust.length"
        assert left(tmp_path) == []


@pytest.mark.fault("F7")
def test_longer_blob_is_refused_by_its_length(tmp_path):
    with Peer(lambda h, first, r: h.reply(200, DATA + b"x")) as peer, pytest.raises(TrustError) as caught:
        fetch(peer.url, tmp_path)
    assert caught.value.code == "trust.length"


def drip(handler, first, has_range):
    handler.send_response(206 if has_range else 200)
    handler.send_header("Content-Length", str(len(DATA) - first))
    if has_range:
        handler.send_header("Content-Range", f"bytes {first}-{len(DATA) - 1}/{len(DATA)}")
    handler.end_headers()
    pause = threading.Event()
    for byte in DATA[first : first + 200]:
        handler.wfile.write(bytes([byte]))
        pause.wait(0.03)


def one_byte_each(handler, first, has_range):
    rest(handler, first, has_range, limit=1)


@pytest.mark.fault("F7")
@pytest.mark.parametrize(("behave", "code"), [(drip, "repository.slow"), (one_byte_each, "repository.unreachable")])
def test_slow_retrieval_ends(tmp_path, behave, code):
    with Peer(behave) as peer, pytest.raises(RepositoryError) as caught:
        fetch(peer.url, tmp_path)
    assert caught.value.code == code
    assert left(tmp_path) == [f"{hex_of(REF.digest)}.part"]


@pytest.mark.fault("F6")
@pytest.mark.parametrize(("status", "code"), [(404, "repository.not_found"), (500, "repository.unreachable")])
def test_server_says_no(tmp_path, status, code):
    with Peer(lambda h, first, r: h.reply(status, b"sorry")) as peer, pytest.raises(RepositoryError) as caught:
        fetch(peer.url, tmp_path)
    assert caught.value.code == code


@pytest.mark.fault("F6")
def test_compressed_answer_is_refused(tmp_path):
    with Peer(lambda h, first, r: h.reply(200, b"x", Content_Encoding="gzip")) as peer, pytest.raises(RepositoryError):
        fetch(peer.url, tmp_path)


def test_too_little_space_is_seen_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "free_bytes", lambda folder: 1000)
    with Peer(rest) as peer:
        with pytest.raises(DeviceError) as caught:
            fetch(peer.url, tmp_path)
        assert peer.requests == []
    assert caught.value.code == "device.disk_full"
    assert "needs 300000 bytes, 1000 are free" in caught.value.message
    assert left(tmp_path) == []


@pytest.mark.fault("F4")
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_disk_fills_up_during_the_download(tmp_path, monkeypatch, error):
    real = os.fsync

    def fails(descriptor):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fails)
    with Peer(rest) as peer, pytest.raises(DeviceError) as caught:
        fetch(peer.url, tmp_path)
    is_full = error != errno.EIO
    assert caught.value.code == ("device.disk_full" if is_full else "device.storage")
    assert left(tmp_path) == ([] if is_full else [f"{hex_of(REF.digest)}.part"])
    monkeypatch.setattr(os, "fsync", real)
    with Peer(rest) as peer:
        assert fetch(peer.url, tmp_path).read_bytes() == DATA


@pytest.mark.fault("F4")
def test_real_file_size_limit_stops_the_write(tmp_path):
    """A write that the system itself refuses, in a child with a file size limit (EFBIG stands for a quota)."""
    import resource
    import subprocess
    import sys

    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from pathlib import Path\n"
        "from edgekit.errors import DeviceError\n"
        "from edgekit.schema.manifest import BlobRef\n"
        "from edgekit.trust.download import download_blob\n"
        "ref = BlobRef(path='model.onnx', role='model', digest=sys.argv[2], size_bytes=int(sys.argv[3]))\n"
        "try:\n    download_blob(sys.argv[1], ref, Path(sys.argv[4]))\n"
        "except DeviceError as error:\n    print(error.code)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    with Peer(rest) as peer:
        command = [sys.executable, "-c", code, peer.url, REF.digest, str(len(DATA)), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "device.storage", done.stderr


def test_complete_file_is_durable_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor):
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *a, **k: (events.append("rename"), real_replace(*a, **k)))
    with Peer(rest) as peer:
        fetch(peer.url, tmp_path)
    assert events == [tmp_path.name, f"{hex_of(REF.digest)}.part", "rename", tmp_path.name]
