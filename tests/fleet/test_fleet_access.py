"""Accounts, sessions, tokens, and what stands between a browser and the fleet."""

from __future__ import annotations

import re
import time

import pytest
from fastapi.testclient import TestClient

from edgekit.errors import UsageError
from edgekit.fleet.access.accounts import Accounts
from edgekit.fleet.access.sessions import IDLE_MS, LONGEST_MS, Sessions, csrf_token, is_csrf_token
from edgekit.fleet.access.tables import api_tokens, sessions, users
from edgekit.fleet.access.throttle import FORGET_S, LoginThrottle
from edgekit.fleet.access.tokens import DAY_MS, ApiTokens
from edgekit.fleet.audit import Audit
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.server import make_app
from edgekit.fleet.services import Services
from edgekit.fleet.store import Store

PASSWORD = "correct horse battery"
PAGES = ("/", "/devices", "/models", "/rollouts", "/alerts", "/registry", "/audit", "/events", "/settings", "/api", "/grid")
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def now_ms():
    return time.time_ns() // 1_000_000


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "fleet.db"))
    yield store
    store.close()


@pytest.fixture
def any_store(database_url):
    """On SQLite and on PostgreSQL: what is said in SQL."""
    store = Store(database_url)
    yield store
    store.close()


def add(store, name="lee", role="admin"):
    Accounts(store).add(name, role=role, password=PASSWORD, actor="local", now_ms=now_ms())


def open_client(store, *, host="127.0.0.1", token="", scheme="http"):
    return TestClient(make_app(store, None, token=token), base_url=f"{scheme}://{host}", follow_redirects=False)


def log_in(client, name="lee", password=PASSWORD, **headers):
    return client.post("/login", data={"name": name, "password": password, "next": "/devices"}, headers=headers)


def csrf(client, path="/settings"):
    return re.search(r'name="csrf" value="([0-9a-f]+)"', client.get(path).text)[1]


# --- nobody has an account


def test_without_users_whoever_sits_here_is_admin(store):
    client = open_client(store)
    for path in PAGES:
        assert client.get(path).status_code == 200, path
    assert "local · admin" in client.get("/").text


def test_first_user_closes_the_door_for_everybody_else(store):
    client = open_client(store)
    made = client.post("/settings/users", data={"name": "lee", "role": "viewer", "password": PASSWORD})
    assert made.status_code == 303
    assert Accounts(store).find("lee").role == "admin"
    for path in PAGES:
        assert client.get(path).status_code == 401, path
        assert client.get(path, headers={"Accept": "text/html"}).status_code in {303, 401}
    assert client.get("/live").status_code == 401
    assert client.get("/api/v1/devices").status_code == 401


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}])
def test_change_from_another_site_is_refused_even_without_accounts(store, headers):
    client = open_client(store)
    answer = client.post("/settings/users", data={"name": "eve", "password": PASSWORD}, headers=headers)
    assert answer.status_code == 403
    assert not Accounts(store).has_any()


# --- logging in


def test_login_gives_a_session_that_ends_with_the_logout(store):
    add(store)
    client = open_client(store)
    assert client.get("/devices", headers={"Accept": "text/html"}).headers["location"] == "/login?next=/devices"
    answer = log_in(client)
    assert (answer.status_code, answer.headers["location"]) == (303, "/devices")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert client.get("/").status_code == 200
    secret = client.cookies["edgekit-session"]
    client.post("/logout", data={"csrf": csrf(client)})
    client.cookies.set("edgekit-session", secret)
    assert client.get("/").status_code == 401
    assert [entry.action for entry in Audit(store).page(actor="lee").entries] == ["login.ended", "login.succeeded"]


def test_session_cookie_over_tls_is_bound_to_the_host(store):
    add(store)
    client = open_client(store, host="fleet.example", scheme="https")
    answer = log_in(client)
    assert answer.headers["set-cookie"].startswith("__Host-edgekit-session=")
    assert "Secure" in answer.headers["set-cookie"]
    assert "max-age" in answer.headers["strict-transport-security"]
    assert client.get("/").status_code == 200


def test_password_is_not_taken_over_a_plain_connection(store):
    add(store)
    answer = log_in(open_client(store, host="fleet.example"))
    assert answer.status_code == 400
    assert "not encrypted" in answer.text


def test_login_replaces_the_session_that_the_browser_came_with(store):
    add(store)
    client = open_client(store)
    log_in(client)
    before = client.cookies["edgekit-session"]
    log_in(client)
    assert client.cookies["edgekit-session"] != before
    assert Sessions(store).find(before, now_ms()) is None


@pytest.mark.parametrize("wanted", ["//evil.example", "https://evil.example/", "/\\evil.example", "javascript:alert(1)"])
def test_login_leads_to_this_server_only(store, wanted):
    add(store)
    answer = open_client(store).post("/login", data={"name": "lee", "password": PASSWORD, "next": wanted})
    assert answer.headers["location"] == "/"


def test_unknown_name_and_wrong_password_say_the_same(store):
    add(store)
    client = open_client(store)
    known, unknown = (log_in(client, name, "wrong wrong wrong") for name in ("lee", "nobody"))
    assert known.status_code == unknown.status_code == 401
    assert "do not fit" in known.text
    strip = re.compile(r'value="[^"]*"')
    assert strip.sub("", known.text) == strip.sub("", unknown.text)


def test_guessing_is_slowed_down_and_the_owner_is_not_locked_out():
    throttle = LoginThrottle()
    for attempt in range(60):
        throttle.note_failure("lee", f"10.0.{attempt}.1", now_s=float(attempt))
    assert throttle.wait_s("lee", "10.9.9.9", now_s=60.0) > 0
    assert throttle.wait_s("lee", "10.9.9.9", now_s=60.0) <= 60
    assert throttle.wait_s("lee", "192.0.2.7", now_s=60.0, is_known_address=True) == 0
    assert throttle.wait_s("lee", "10.9.9.9", now_s=60.0 + FORGET_S + 1) == 0
    for attempt in range(12):
        throttle.note_failure("lee", "10.1.1.1", now_s=100.0 + attempt)
    assert throttle.wait_s("lee", "10.1.1.1", now_s=111.0, is_known_address=True) > 60


def test_too_many_attempts_are_answered_without_looking(store):
    add(store)
    client = open_client(store)
    for _ in range(5):
        assert log_in(client, password="wrong wrong wrong").status_code == 401
    answer = log_in(client)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 0
    assert len(Audit(store).page(subject="user:lee").entries) == 6


# --- sessions


def test_session_ends_when_idle_and_when_old(any_store):
    store = any_store
    add(store)
    accounts, service = Accounts(store), Sessions(store)
    start = 1_000_000_000_000
    secret = service.start(accounts.find("lee").id, address="a", agent="b", now_ms=start)
    assert service.find(secret, start + IDLE_MS - 1).name == "lee"
    assert service.find(secret, start + 2 * IDLE_MS) is None
    moment = start
    while moment < start + LONGEST_MS:
        assert service.find(secret, moment) is not None
        moment += IDLE_MS // 2
    assert service.find(secret, start + LONGEST_MS) is None


def test_database_holds_no_secret(any_store):
    store = any_store
    add(store)
    service = Sessions(store)
    secret = service.start(Accounts(store).find("lee").id, address="a", agent="b", now_ms=now_ms())
    token = ApiTokens(store).create("export", role="viewer", days=1, actor="local", now_ms=now_ms()).token
    with store.read() as connection:
        text = str([connection.execute(table.select()).all() for table in (users, sessions, api_tokens)])
    for hidden in (secret, token, token.removeprefix("ekf_"), PASSWORD):
        assert hidden not in text
    assert "$argon2id$" in text


def test_changed_password_ends_every_other_session(store):
    add(store)
    first, second = open_client(store), open_client(store)
    log_in(first)
    log_in(second)
    data = {"old": PASSWORD, "new": "another long sentence", "again": "another long sentence", "csrf": csrf(first)}
    assert first.post("/settings/password", data=data | {"old": "wrong wrong wrong"}).status_code == 400
    assert first.post("/settings/password", data=data).status_code == 303
    assert first.get("/").status_code == 200
    assert second.get("/").status_code == 401
    assert log_in(second).status_code == 401
    assert log_in(second, password="another long sentence").status_code == 303


def test_removed_user_and_lowered_role_hold_at_once(any_store):
    store = any_store
    add(store)
    add(store, "kim", "operator")
    client = open_client(store)
    log_in(client, "kim")
    assert client.get("/").status_code == 200
    Accounts(store).set_role("kim", "viewer", actor="lee", now_ms=now_ms())
    assert "kim · viewer" in client.get("/").text
    Accounts(store).remove("kim", actor="lee", now_ms=now_ms())
    assert client.get("/").status_code == 401


@pytest.mark.parametrize(("password", "code"), [("short", "access.password"), ("aaaaaaaaaaaa", "access.password")])
def test_password_that_is_guessed_first_is_refused(store, password, code):
    with pytest.raises(UsageError) as caught:
        Accounts(store).add("lee", role="admin", password=password, actor="local", now_ms=1)
    assert caught.value.code == code


def test_last_admin_stays_as_long_as_there_are_others(any_store):
    store = any_store
    add(store)
    add(store, "kim", "viewer")
    for change in (
        lambda: Accounts(store).remove("lee", actor="x", now_ms=1),
        lambda: Accounts(store).set_role("lee", "viewer", actor="x", now_ms=1),
    ):
        with pytest.raises(UsageError) as caught:
            change()
        assert caught.value.code == "access.last_admin"
    Accounts(store).remove("kim", actor="x", now_ms=1)
    Accounts(store).remove("lee", actor="x", now_ms=1)
    assert not Accounts(store).has_any()


# --- forged requests


def test_form_without_the_sessions_token_is_refused(store):
    add(store)
    client = open_client(store)
    log_in(client)
    name = {"name": "kim", "role": "viewer", "password": PASSWORD}
    assert client.post("/settings/users", data=name).status_code == 403
    other = open_client(store)
    log_in(other)
    assert client.post("/settings/users", data=name | {"csrf": csrf(other)}).status_code == 403
    assert client.post("/api/v1/users", json=name).status_code == 403
    assert client.post("/api/v1/users", json=name, headers={"X-CSRF-Token": csrf(client)}).status_code == 201
    assert Accounts(store).find("kim") is not None


def test_csrf_token_differs_each_time_and_holds_for_its_session():
    first, second = csrf_token("secret"), csrf_token("secret")
    assert first != second
    assert is_csrf_token("secret", first)
    assert is_csrf_token("secret", second)
    assert not is_csrf_token("other", first)
    assert not any(is_csrf_token("secret", bad) for bad in ("", "zz", first[:-2], "0" * 128))


def test_form_that_is_too_long_is_refused(store):
    add(store)
    client = open_client(store)
    log_in(client)
    assert client.post("/settings/users", content=b"name=" + b"x" * 300_000, headers=FORM).status_code == 413


# --- roles


def test_viewer_may_look_and_change_nothing(store):
    add(store)
    add(store, "kim", "viewer")
    client = open_client(store)
    log_in(client, "kim")
    token = csrf(client)
    assert client.get("/rollouts").status_code == 200
    for path in ("/rollouts/1/halt", "/alerts/1/acknowledge", "/silences", "/api/v1/rollouts", "/settings/users"):
        assert client.post(path, data={"csrf": token, "reason": "x"}, headers={"X-CSRF-Token": token}).status_code == 403, path
    assert client.get("/api/v1/users").status_code == 403
    assert client.post("/settings/tokens", data={"csrf": token, "name": "x", "role": "admin"}).status_code == 400
    assert "shown this once" in client.post("/settings/tokens", data={"csrf": token, "name": "x", "role": "viewer"}).text


def test_operator_makes_no_users(store):
    add(store)
    add(store, "kim", "operator")
    client = open_client(store)
    log_in(client, "kim")
    data = {"csrf": csrf(client), "name": "eve", "role": "admin", "password": PASSWORD}
    assert client.post("/settings/users", data=data).status_code == 403
    assert Accounts(store).find("eve") is None


# --- tokens


def test_token_has_a_role_and_an_end(any_store):
    store = any_store
    add(store)
    tokens = ApiTokens(store)
    made = tokens.create("export", role="viewer", days=2, actor="lee", now_ms=now_ms())
    client = open_client(store)
    header = {"Authorization": f"Bearer {made.token}"}
    assert client.get("/api/v1/me", headers=header).json()["role"] == "viewer"
    assert client.post("/api/v1/users", json={}, headers=header).status_code == 403
    assert tokens.list(now_ms())[0].last_used_ms
    assert tokens.find(made.token, now_ms() + 3 * DAY_MS) is None
    tokens.revoke(made.view.id, actor="lee", now_ms=now_ms())
    assert client.get("/api/v1/me", headers=header).status_code == 401


def test_token_does_no_more_than_its_owner_and_ends_with_him(any_store):
    store = any_store
    add(store)
    add(store, "kim", "operator")
    kim = Accounts(store).find("kim")
    tokens = ApiTokens(store)
    with pytest.raises(UsageError):
        tokens.create("x", role="admin", days=1, actor="kim", now_ms=1, owner=kim, at_most="operator")
    made = tokens.create("x", role="operator", days=1, actor="kim", now_ms=now_ms(), owner=kim, at_most="operator")
    assert tokens.find(made.token, now_ms()).role == "operator"
    Accounts(store).set_role("kim", "viewer", actor="lee", now_ms=now_ms())
    assert tokens.find(made.token, now_ms()).role == "viewer"
    Accounts(store).remove("kim", actor="lee", now_ms=now_ms())
    assert tokens.find(made.token, now_ms()) is None


def test_wrong_bearer_is_nobody_even_with_a_session(store):
    add(store)
    client = open_client(store)
    log_in(client)
    assert client.get("/api/v1/me", headers={"Authorization": "Bearer ekf_wrong"}).status_code == 401


def test_servers_own_token_opens_api_and_pages(store):
    client = open_client(store, token="letmein")
    assert client.get("/api/v1/me").status_code == 401
    assert client.get("/api/v1/me", headers={"Authorization": "Bearer letmein"}).json() == {"name": "token", "role": "admin"}
    assert client.get("/", headers={"Accept": "text/html"}).headers["location"].startswith("/login")
    assert "server's token" in client.get("/login").text
    assert client.post("/login", data={"token": "wrong", "next": "/"}).status_code == 401
    assert client.post("/login", data={"token": "letmein", "next": "/"}).status_code == 303
    assert client.get("/").status_code == 200
    assert client.post("/settings/users", data={"name": "lee", "password": PASSWORD}).status_code == 403
    assert client.post("/settings/users", data={"name": "lee", "password": PASSWORD, "csrf": csrf(client)}).status_code == 303


# --- headers


def test_every_answer_carries_the_security_headers(store):
    client = open_client(store)
    for path in ("/", "/api/v1/fleet", "/static/0/app.css", "/nowhere", "/login"):
        headers = client.get(path, headers={"Accept": "text/html"}).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cross-origin-opener-policy"] == "same-origin"


def test_off_loopback_nobody_is_let_in_without_an_account(tmp_path):
    from edgekit.fleet import assembly

    config = FleetConfig(host="0.0.0.0", database=str(tmp_path / "fleet.db"))
    store = Store(config.database)
    services: Services = assembly.assemble(config, store)
    client = TestClient(make_app(store, None, services=services), base_url="http://localhost", follow_redirects=False)
    assert client.get("/").status_code == 401
    store.close()
