"""The identity's API: what is open, what is not, how often one may be wrong, and the same on PostgreSQL."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from edgekit.agent.certificates import make_request, read_certificates
from edgekit.fleet.access.guard import Actor
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.identity.api import OPEN_PATHS, make_router
from edgekit.fleet.identity.throttle import MAX_ADDRESSES, Throttle
from edgekit.fleet.jobs import Jobs
from edgekit.fleet.server import make_app
from edgekit.fleet.services import Services
from edgekit.trust.p256 import PrivateKey


@pytest.fixture
def client(fleet):
    config = FleetConfig(token="secret")
    services = Services(config=config, store=fleet.store, jobs=Jobs(fleet.store, owner="t"), identity=fleet.identity)
    app = make_app(fleet.store, None, token="secret", services=services)
    with TestClient(app, base_url="http://fleet.example.com") as made:
        yield made


TOKEN = {"Authorization": "Bearer secret"}


def test_device_without_a_token_enrols_and_sees_nothing_else(fleet, client):
    request = make_request(PrivateKey.generate(), "")
    asked = {"claim": fleet.claim(), "request": request}
    answer = client.post("/api/v1/enroll", json=asked)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert read_certificates(answer.json()["certificate"])[0].common_name == "lab/cam-7"
    assert client.get("/api/v1/ca").text == fleet.authority.servers_pem
    assert client.get("/api/v1/crl").text.count("BEGIN X509 CRL") == 2
    for path in ("/api/v1/claims", "/api/v1/identities", "/api/v1/fleet", "/"):
        assert client.get(path, follow_redirects=False).status_code in {401, 303}, path
    assert client.post("/api/v1/claims", json={"site": "lab", "device": "x"}).status_code in {401, 403}
    assert client.post("/api/v1/identities/lab/cam-7/revoke", json={"reason": "x"}).status_code in {401, 403}
    assert client.get("/api/v1/ready").status_code == 204
    assert len(OPEN_PATHS) == 5


def test_operator_claims_lists_and_revokes(fleet, client):
    body = {"site": "lab", "device": "cam-9", "seconds": 3600, "labels": {"room": "b"}}
    made = client.post("/api/v1/claims", json=body, headers=TOKEN).json()
    assert made["fingerprint"] == fleet.authority.fingerprint
    listed = client.get("/api/v1/claims", headers=TOKEN).json()
    assert [(each["id"], each["state"]) for each in listed] == [(made["id"], "open")]
    assert made["claim"].partition(".")[2] not in json.dumps(listed)
    request = make_request(PrivateKey.generate(), "")
    assert client.post("/api/v1/enroll", json={"claim": made["claim"], "request": request}).status_code == 200
    page = client.get("/api/v1/identities", headers=TOKEN).json()
    assert [(each["device"], each["state"], each["labels"]) for each in page["identities"]] == [
        ("cam-9", "valid", {"room": "b"})
    ]
    revoked = client.post("/api/v1/identities/lab/cam-9/revoke", json={"reason": "sold"}, headers=TOKEN)
    assert revoked.json() == {"certificates": 1}
    assert client.get("/api/v1/identities?state=revoked", headers=TOKEN).json()["identities"][0]["reason"] == "sold"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/api/v1/enroll", b"", 400, "record.malformed"),
        ("/api/v1/enroll", b'{"claim": 1}', 400, "record.malformed"),
        ("/api/v1/enroll", b'{"claim": "a.b", "request": "x"}', 400, "identity.request"),
        ("/api/v1/renew", b"[]", 400, "record.malformed"),
        ("/api/v1/claims", b'{"site": "LAB", "device": "x"}', 400, "telemetry.name"),
        ("/api/v1/identities/lab/nobody/revoke", b'{"reason": "x"}', 404, "identity.unknown"),
    ],
)
def test_wrong_request_gets_a_code_and_words(client, path, body, status, code):
    answer = client.post(path, content=body, headers=TOKEN)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["detail"]


@pytest.mark.parametrize(("role", "status"), [("viewer", 403), ("operator", 200)])
def test_viewer_neither_claims_nor_revokes(fleet, role, status):
    fleet.pair("lab", "cam-1")
    services = Services(config=FleetConfig(), store=fleet.store, jobs=Jobs(fleet.store, owner="t"), identity=fleet.identity)
    app = FastAPI()

    @app.middleware("http")
    async def somebody(request: Request, call_next):
        request.state.actor = Actor(name="somebody", role=role)
        return await call_next(request)

    app.include_router(make_router(services))
    with TestClient(app) as client:
        claimed = client.post("/api/v1/claims", json={"site": "lab", "device": "cam-2"})
        withdrawn = client.delete(f"/api/v1/claims/{fleet.claim().partition('.')[0]}")
        revoked = client.post("/api/v1/identities/lab/cam-1/revoke", json={"reason": "x"})
        seen = client.get("/api/v1/identities")
    assert {claimed.status_code, revoked.status_code} == {status}
    assert withdrawn.status_code == (204 if status == 200 else status)
    assert seen.status_code == 200


def test_request_that_lacks_a_field_is_told_so(client):
    for path in ("/api/v1/claims", "/api/v1/identities/lab/x/revoke"):
        answer = client.post(path, content=b"{}", headers=TOKEN)
        assert (answer.status_code, "missing required field" in answer.json()["detail"]) == (400, True)


def test_endless_body_is_cut_off(client):
    assert client.post("/api/v1/enroll", content=b"x" * 40_000).status_code == 413


def test_unknown_claim_is_not_withdrawn(client):
    assert client.delete("/api/v1/claims/none", headers=TOKEN).status_code == 404


def test_guesser_must_wait_and_those_who_are_right_do_not(fleet, client):
    request = make_request(PrivateKey.generate(), "")
    claims = [fleet.claim("lab", f"cam-{number}") for number in range(12)]
    for claim in claims:
        asked = {"claim": claim, "request": make_request(PrivateKey.generate(), "")}
        assert client.post("/api/v1/enroll", json=asked).status_code == 200
    codes = [
        client.post("/api/v1/enroll", json={"claim": f"{number}.x", "request": request}).status_code for number in range(12)
    ]
    assert codes == [403] * 10 + [429] * 2
    late = client.post("/api/v1/enroll", json={"claim": fleet.claim(), "request": request})
    assert late.status_code == 429
    assert late.headers["retry-after"] == "60"


def test_bucket_of_all_addresses_closes_and_few_are_remembered():
    throttle = Throttle(burst=2.0, per_minute=60.0, factor=3.0)
    for number in range(6):
        throttle.note_failure(str(number), now_s=0.0)
    assert not throttle.is_open("somebody else", now_s=0.0)
    assert throttle.is_open("somebody else", now_s=1.0)
    for number in range(MAX_ADDRESSES + 100):
        throttle.note_failure(str(number), now_s=1.0)
    assert len(throttle._buckets) == MAX_ADDRESSES


def test_server_without_an_authority_says_so(fleet):
    services = Services(config=FleetConfig(), store=fleet.store, jobs=Jobs(fleet.store, owner="t"))
    with TestClient(make_app(fleet.store, None, services=services), base_url="http://127.0.0.1") as client:
        answer = client.post("/api/v1/enroll", json={})
    assert answer.status_code == 404
    assert "--authority" in answer.json()["detail"]


def test_fleet_server_by_tls_shows_its_certificate(fleet, api):
    context = ssl.create_default_context(cafile=str(fleet.authority.folder / "ca.pem"))
    with urllib.request.urlopen(f"{api.url}/api/v1/ca", context=context) as answer:
        assert answer.read().decode() == fleet.authority.servers_pem
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{api.url}/api/v1/ca")
