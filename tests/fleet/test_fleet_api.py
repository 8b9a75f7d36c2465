"""/api/v1 over a real store, and the rules of the server around it."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from fleet_world import T0, birth, event, reported, window, windows

from edgekit.fleet import api
from edgekit.fleet.server import make_app
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "fleet.db"))
    messages = (birth(), reported(), windows(window(3), window(4, T0 + 10_000)), event(5, detail="<script>alert(1)</script>"))
    store.apply([Received(site="lab", device="pi-1", message=m, received_ms=T0) for m in messages])
    yield store
    store.close()


@pytest.fixture
def client(store, monkeypatch):
    monkeypatch.setattr(api, "now_ms", lambda: T0 + 20_000)
    return TestClient(make_app(store, None), base_url="http://127.0.0.1")


def test_devices_answer(client):
    page = client.get("/api/v1/devices").json()
    assert page["total"] == 1
    assert page["devices"][0]["device"] == "pi-1"
    assert client.get("/api/v1/devices", params={"state": "offline"}).json()["total"] == 0


def test_device_answers_and_unknown_is_404(client):
    assert client.get("/api/v1/devices/lab/pi-1").json()["gaps"]["received"] == 5
    assert client.get("/api/v1/devices/lab/pi-9").status_code == 404


def test_series_answers_in_the_order_asked(client):
    answer = client.get("/api/v1/devices/lab/pi-1/series", params={"metric": "latency_p50_ms,requests", "since": 1})
    names = [(series["metric"], series["unit"], len(series["points"])) for series in answer.json()]
    assert names == [("latency_p50_ms", "ms", 2), ("requests", "1/s", 2)]


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "limit=x", "state=asleep", f"search={'x' * 101}"])
def test_bad_query_is_refused(client, query):
    assert client.get(f"/api/v1/devices?{query}").status_code == 422


def test_openapi_describes_every_route(client):
    document = client.get("/api/v1/openapi.json").json()
    paths = {path for path in document["paths"] if path.startswith("/api/v1")}
    assert {"/api/v1/health", "/api/v1/fleet", "/api/v1/devices", "/api/v1/events"} <= paths
    schemas = document["components"]["schemas"]
    for path in (path for path in paths if "get" in document["paths"][path]):
        schema = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        reference = schema.get("$ref") or schema["items"]["$ref"]
        assert reference.rsplit("/", 1)[1] in schemas


def test_token_guards_everything(store):
    client = TestClient(make_app(store, None, token="letmein"), base_url="http://127.0.0.1", follow_redirects=False)
    assert client.get("/api/v1/devices").status_code == 401
    assert client.get("/").status_code == 401
    assert client.get("/api/v1/devices", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/api/v1/devices", headers={"Authorization": "Bearer letmein"}).status_code == 200
    opened = client.get("/?token=letmein")
    assert opened.status_code == 303
    assert "httponly" in opened.headers["set-cookie"].lower()
    assert client.get("/api/v1/devices", cookies={"edgekit-token": "letmein"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 421), ("127.0.0.1.evil.example", 421), ("localhost", 200), ("[::1]", 200), ("fleet.example", 200)],
)
def test_foreign_name_is_refused_without_a_token(store, host, status):
    client = TestClient(make_app(store, None, allowed_hosts=("fleet.example",)), base_url=f"http://{host}:8420")
    assert client.get("/api/v1/devices").status_code == status


def test_redirect_stays_here(store):
    client = TestClient(make_app(store, None, token="letmein"), base_url="http://127.0.0.1", follow_redirects=False)
    assert client.get("http://127.0.0.1//evil.example/?token=letmein").headers["location"] == "/evil.example/"


def test_releases_name_their_sites(client):
    assert client.get("/api/v1/releases").json()[0]["sites"] == {"lab": 1}


def test_security_headers_are_set(client):
    answer = client.get("/api/v1/fleet")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
