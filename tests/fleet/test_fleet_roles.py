"""A server that only ingests, and one that does not: over one broker and one database."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from tests.fleet.fleet_world import WireDevice, birth, free_port, wait_until
from tests.fleet.identity.test_identity_story import Site


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


def ask(port: int, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_ingest_stores_and_web_shows(site, tmp_path):
    web, ingest, broker, own = (free_port() for _ in range(4))
    common = ("--db", "fleet.db", "--group", "fleet")
    serve = ("fleet", "serve")
    site.serve("all", "dashboard", *serve, "--port", str(own), "--broker-port", str(broker), "--db", "other.db")
    far = ("--broker", f"mqtt://127.0.0.1:{broker}")
    site.serve("web", "dashboard", *serve, *common, *far, "--role", "web", "--port", str(web), "--client-id", "web")
    site.serve("in", "dashboard", *serve, *common, *far, "--role", "ingest", "--port", str(ingest), "--client-id", "ingest")
    wait_until(lambda: ask(ingest, "/api/v1/ready")[0] == 204)
    assert ask(ingest, "/api/v1/fleet") == (404, b"404: this server only ingests\n")
    assert json.loads(ask(ingest, "/api/v1/health")[1])["is_healthy"]
    assert ask(web, "/api/v1/ready") == (204, b"")
    assert json.loads(ask(web, "/api/v1/health")[1])["is_healthy"]
    device = WireDevice(broker, "pi-1")
    device.send("status", birth())
    device.close()
    wait_until(lambda: json.loads(ask(web, "/api/v1/devices")[1])["devices"])
    assert json.loads(ask(web, "/api/v1/health")[1])["ingest"]["received"] == 0


def test_ingest_without_its_broker_is_not_ready_and_pages_are(site):
    ports = [free_port() for _ in range(3)]
    for role, port in zip(("web", "ingest"), ports, strict=False):
        words = ("--db", f"{role}.db", "--broker", f"mqtt://127.0.0.1:{ports[2]}", "--port", str(port), "--role", role)
        site.serve(role, "dashboard", "fleet", "serve", *words)
    assert [ask(port, "/api/v1/ready")[0] for port in ports[:2]] == [204, 503]


def test_role_that_is_none_is_refused(site):
    assert "no such role" in site.edgekit("fleet", "serve", "--role", "queen", code=2)
