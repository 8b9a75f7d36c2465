"""Login at a provider that really runs, on loopback."""

from __future__ import annotations

import time

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from joserfc.jwk import RSAKey
from oidc_provider import Provider

from edgekit.errors import UsageError
from edgekit.fleet.access.accounts import Accounts
from edgekit.fleet.access.gate import Gate
from edgekit.fleet.access.oidc import load_settings
from edgekit.fleet.access.service import Access
from edgekit.fleet.audit import Audit
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.jobs import Jobs
from edgekit.fleet.services import Services
from edgekit.fleet.store import Store
from edgekit.fleet.web import site

ROLES = '[roles]\nfleet-operators = "operator"\nfleet-admins = "admin"\n'


@pytest.fixture
def provider():
    provider = Provider()
    yield provider
    provider.stop()


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "fleet.db"))
    yield store
    store.close()


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def write_settings(tmp_path, provider, *, roles=ROLES, more=""):
    path = tmp_path / "oidc.toml"
    path.write_text(f'issuer = "{provider.url}"\nclient_id = "edgekit"\nname = "The plant"\n{more}\n{roles}')
    return path


@pytest.fixture
def client(store, provider, tmp_path, clock):
    access = Access(store, oidc=str(write_settings(tmp_path, provider)), monotonic=clock)
    services = Services(config=FleetConfig(), store=store, jobs=Jobs(store, owner="test"), access=access)
    return TestClient(_app(services), base_url="http://127.0.0.1", follow_redirects=False)


def _app(services):
    app = FastAPI()
    pages = site.make_site(services, version="test")
    app.include_router(site.make_router(pages))
    site.add_refusals(app, pages)
    app.add_middleware(Gate, access=services.access)
    return app


def walk(client, **changes):
    """To the provider and back, as a browser goes."""
    away = client.get("/login/oidc?next=/rollouts").headers["location"]
    back = httpx.get(away).headers["location"]
    path = back.removeprefix("http://127.0.0.1")
    for old, new in changes.items():
        path = path.replace(old, new)
    return client.get(path)


def test_login_at_the_provider_gives_its_role(client, store):
    assert "Log in at The plant" in client.get("/login").text
    answer = walk(client)
    assert (answer.status_code, answer.headers["location"]) == (303, "/rollouts")
    assert "robin · operator" in client.get("/").text
    assert Accounts(store).find("robin").role == "operator"
    assert [entry.action for entry in Audit(store).page(subject="user:robin").entries] == ["login.succeeded", "user.added"]


def test_role_is_read_anew_at_each_login(client, provider, store):
    walk(client)
    provider.claims["groups"] = ["fleet-admins", "fleet-operators"]
    walk(client)
    assert "robin · admin" in client.get("/").text
    assert len(Accounts(store).list()) == 1


def test_user_without_a_group_is_refused(client, provider, store):
    provider.claims["groups"] = ["cooks"]
    answer = walk(client)
    assert answer.status_code == 403
    assert "cooks" in answer.text
    assert not Accounts(store).has_any()
    assert Audit(store).page().entries[0].action == "login.failed"


def test_user_keeps_his_account_when_he_changes_his_name(client, provider, store):
    walk(client)
    provider.claims["preferred_username"] = "robin.new"
    walk(client)
    assert [user.name for user in Accounts(store).list()] == ["robin"]


def test_name_of_a_local_user_is_not_taken_over(client, store):
    Accounts(store).add("robin", role="admin", password="correct horse battery", actor="local", now_ms=1)
    answer = walk(client)
    assert answer.status_code == 403
    assert "there is" in answer.text or "has a user of that name" in answer.text


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("aud", "another", "somebody else"),
        ("aud", ["edgekit", "another"], "given to somebody else"),
        ("iss", "http://127.0.0.1:1", "issuer"),
        ("nonce", "of another login", "another login"),
        ("exp", int(time.time()) - 3600, "expired"),
        ("iat", int(time.time()) + 3600, "future"),
        ("sub", "", "nobody"),
    ],
)
def test_id_token_that_is_not_for_this_login_is_refused(client, provider, store, name, value, says):  # noqa: PLR0917
    provider.wrong = {name: value}
    answer = walk(client)
    assert answer.status_code == 403
    assert says in answer.text
    assert not Accounts(store).has_any()


def test_token_signed_by_another_key_is_refused(client, provider):
    provider.signer = RSAKey.generate_key(2048, parameters={"kid": provider.key.kid})
    assert "not signed" in walk(client).text


def test_rotated_keys_are_fetched_again(client, provider, clock):
    walk(client)
    provider.rotate()
    assert walk(client).status_code == 403, "a flood of unknown keys asks the provider only now and then"
    clock.now += 11
    assert walk(client).status_code == 303
    assert provider.discovered == 1


def test_state_of_another_browser_or_none_is_refused(client, provider):
    away = client.get("/login/oidc").headers["location"]
    back = httpx.get(away).headers["location"].removeprefix("http://127.0.0.1")
    client.cookies.clear()
    answer = client.get(back)
    assert answer.status_code == 403
    assert "this browser" in answer.text


def test_code_counts_once(client):
    away = client.get("/login/oidc").headers["location"]
    back = httpx.get(away).headers["location"].removeprefix("http://127.0.0.1")
    state = client.cookies["edgekit-oidc"]
    assert client.get(back).status_code == 303
    client.cookies.set("edgekit-oidc", state, domain="127.0.0.1", path="/login")
    assert client.get(back).status_code == 403


def test_issuer_in_the_answer_must_be_the_one_that_was_asked(client, provider):
    assert (
        "comes from"
        in walk(client, **{provider.url.replace(":", "%3A").replace("/", "%2F"): "https%3A%2F%2Fevil.example"}).text
    )


def test_provider_that_is_away_is_told(client, provider):
    provider.stop()
    answer = client.get("/login/oidc", headers={"Accept": "text/html"})
    assert answer.status_code == 503
    assert "does not answer" in answer.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('issuer = "http://login.example"\nclient_id = "x"\n' + ROLES, "https"),
        ('issuer = "https://login.example"\nclient_id = "x"\n', "no role"),
        ('issuer = "https://login.example"\nclient_id = "x"\nclientsecret = "y"\n' + ROLES, "clientsecret"),
        ('issuer = "https://login.example"\nclient_id = "x"\nclient_secret_file = "none"\n' + ROLES, "none"),
        ("nonsense", "oidc.toml"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, text, says):
    path = tmp_path / "oidc.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_settings(path)
    assert says in caught.value.message + caught.value.hint
