"""``edgekit fleet user`` and ``edgekit fleet token``, as typed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edgekit.fleet.access.accounts import Accounts
from edgekit.fleet.access.tokens import ApiTokens
from edgekit.fleet.audit import Audit
from edgekit.fleet.store import Store

PASSWORD = "correct horse battery"


def edgekit(*arguments, database, stdin=""):
    command = [sys.executable, "-m", "edgekit", "fleet", *arguments, "--db", str(database)]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=60, check=False)


@pytest.fixture
def database(tmp_path):
    return tmp_path / "fleet.db"


def test_first_user_is_admin_and_the_next_a_viewer(database):
    first = edgekit("user", "add", "lee", "--password-stdin", database=database, stdin=PASSWORD + "\n")
    assert first.returncode == 0, first.stderr
    assert "lee is admin" in first.stderr
    assert edgekit("user", "add", "kim", "--password-stdin", database=database, stdin=PASSWORD).returncode == 0
    listed = json.loads(edgekit("user", "list", "--json", database=database).stdout)
    assert [(user["name"], user["role"]) for user in listed] == [("kim", "viewer"), ("lee", "admin")]
    assert PASSWORD not in first.stdout + first.stderr + str(listed)
    store = Store(str(database))
    assert Accounts(store).authenticate("lee", PASSWORD).role == "admin"
    assert [entry.actor for entry in Audit(store).page(subject="user:").entries] == ["local", "local"]
    store.close()


def test_password_role_and_removal(database):
    edgekit("user", "add", "lee", "--password-stdin", database=database, stdin=PASSWORD)
    edgekit("user", "add", "kim", "--role", "operator", "--password-stdin", database=database, stdin=PASSWORD)
    assert edgekit("user", "passwd", "kim", "--password-stdin", database=database, stdin="another long one").returncode == 0
    assert edgekit("user", "role", "kim", "viewer", database=database).returncode == 0
    last = edgekit("user", "remove", "lee", database=database)
    assert last.returncode == 2
    assert "last admin" in last.stderr
    assert edgekit("user", "remove", "kim", database=database).returncode == 0
    store = Store(str(database))
    assert Accounts(store).find("kim") is None
    store.close()


def test_token_is_printed_once_and_revoked(database):
    edgekit("user", "add", "lee", "--password-stdin", database=database, stdin=PASSWORD)
    made = edgekit("token", "create", "nightly export", "--role", "operator", "--days", "7", database=database)
    token = made.stdout.strip()
    assert token.startswith("ekf_")
    listed = edgekit("token", "list", "--json", database=database).stdout
    assert token not in listed
    number = json.loads(listed)[0]["id"]
    store = Store(str(database))
    assert ApiTokens(store).find(token, 1).role == "operator"
    assert edgekit("token", "revoke", str(number), database=database).returncode == 0
    assert ApiTokens(store).find(token, 1) is None
    store.close()
    assert edgekit("token", "revoke", str(number), database=database).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (("user", "add", "lee", "--password-stdin"), "short", "10 to 512"),
        (("user", "add", "l ee", "--password-stdin"), PASSWORD, "not a user's name"),
        (("user", "add", "lee", "--role", "viewer", "--password-stdin"), PASSWORD, "first user is admin"),
        (("user", "add", "lee"), "", "--password-stdin"),
        (("user", "passwd", "nobody", "--password-stdin"), PASSWORD, "no such file"),
        (("token", "create", "x"), "", "no such file"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_made(database, arguments, stdin, says):
    done = edgekit(*arguments, database=database, stdin=stdin)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
