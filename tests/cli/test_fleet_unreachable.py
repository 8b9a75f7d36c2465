"""``edgekit fleet devices`` against servers that are not there, closed, or something else."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from edgekit.cli import main as cli_main


@pytest.fixture
def stranger():
    """A web server that is no fleet server: /closed/... wants a token, everything else is a page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401 if self.path.startswith("/closed") else 200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def devices(url, capsys):
    code = cli_main.main(["fleet", "devices", "--url", url])
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


def test_page_is_not_taken_for_the_api(stranger, capsys):
    code, text = devices(stranger, capsys)
    assert code == 3
    assert "something else than JSON" in text


def test_closed_server_names_the_token(stranger, capsys):
    code, text = devices(f"{stranger}/closed", capsys)
    assert code == 3
    assert "401" in text
    assert "EDGEKIT_FLEET_TOKEN" in text


def test_refused_connection_reads_well(capsys):
    code, text = devices("http://127.0.0.1:1", capsys)
    assert code == 3
    assert "does not answer: Connection refused." in text
    assert "urlopen" not in text
