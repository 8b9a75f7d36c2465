"""The demonstration's own parts; the whole of it is run by CI."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time

import numpy as np
import pytest

from edgekit.cli import demo, demo_processes
from edgekit.errors import OperationError, UsageError


def test_free_port_gives_way_when_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo_processes.free_port(port) != port
    assert demo_processes.free_port(port) == port


def test_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError) as caught:
        demo._prepare_folder(tmp_path)
    assert caught.value.code == "demo.folder_in_use"
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_own_folder_is_used_again(tmp_path):
    (tmp_path / demo.MARKER).write_text("")
    (tmp_path / "old").write_text("")
    assert list(demo._prepare_folder(tmp_path).iterdir()) == []


def test_missing_sample_is_named(tmp_path):
    with pytest.raises(UsageError) as caught:
        demo._find_sample(tmp_path)
    assert caught.value.code == "demo.no_sample"


def test_failed_step_shows_the_end_of_its_log(tmp_path):
    log = tmp_path / "step.log"
    with pytest.raises(OperationError, match="nowhere"):
        demo_processes.run_edgekit("bundle", "inspect", str(tmp_path / "nowhere.edgekit"), log=log)


def test_programs_are_ended(tmp_path):
    programs = demo_processes.Programs(log_dir=tmp_path)
    program = programs.start("target", "--help")
    program.process.wait(30)
    (tmp_path / "metadata").mkdir()
    server = programs.start(
        "agent", "run", "--state-dir", str(tmp_path / "state"), "--model", "m", "--device", "d", "--site", "s"
    )
    time.sleep(0.5)
    programs.stop()
    assert server.process.poll() is not None
    assert programs.started == []


@pytest.mark.parametrize(("status", "failed"), [(200, 0), (503, 1)])
def test_load_counts_failures_and_digests(status, failed):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            body = json.dumps({"outputs": [{"data": [0.0, 1.0]}], "parameters": {"model_digest": "sha256:ab"}}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments):
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    load = demo_processes.Load(
        server.server_port, "m", np.zeros((3, 1, 2, 2), np.float32), np.array([1, 1, 0]), per_second=200.0
    )
    load.start()
    time.sleep(0.3)
    load.stop()
    server.shutdown()
    assert load.sent >= 3
    assert load.failed == (load.sent if failed else 0)
    assert sum(load.by_digest.values()) == load.sent - load.failed
    assert failed or load.correct > 0
