"""``edgekit fleet user`` and ``edgekit fleet token``: who may see and change the fleet, in the database itself.

They work where the database is, with or without a server: so the first admin is made, and a lost password replaced.
"""

from __future__ import annotations

import getpass
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import note, out, out_json, table
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from edgekit.fleet.store import Store

ACTOR = "local"
_SETTINGS = {"help_option_names": ["-h", "--help"]}
user_app = typer.Typer(
    help="Users: add, list, passwd, role, remove.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)
token_app = typer.Typer(
    help="API tokens: create, list, revoke.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)
DATABASE = typer.Option("edgekit-fleet.db", "--db", help="The --db of edgekit fleet serve: a file, or a SQLAlchemy URL.")
NAME = typer.Argument(..., metavar="NAME", help="The user's name.")
STDIN = typer.Option(False, "--password-stdin", help="Read the password from standard input.")
JSON = typer.Option(False, "--json", help="Print the records as JSON.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(user_app, name="user")
    app.add_typer(token_app, name="token")


@contextmanager
def _store(database: str, *, may_create: bool = False) -> Iterator[Store]:
    from edgekit.fleet.store import Store

    if "://" not in database and not may_create and not Path(database).is_file():
        raise UsageError("fleet.database", f"{database}: no such file.", hint="Give the --db of edgekit fleet serve.")
    store = Store(database)
    try:
        yield store
    finally:
        store.close()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _moment(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M") if time_ms else "never"


def _ask_password(name: str, *, is_stdin: bool) -> str:
    """The password, typed twice without being shown, or the first line of standard input."""
    if is_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        hint = "Type it at a terminal, or give --password-stdin."
        raise UsageError("access.password", f"{name}: no password was given, and there is no terminal to ask at.", hint=hint)
    password = getpass.getpass(f"password for {name}: ")
    if getpass.getpass("once more: ") != password:
        raise UsageError("access.password", "the password was typed in two ways.", hint="Try again.")
    return password


# --- users


@user_app.command("add")
def add_user(
    name: str = NAME,
    role: str = typer.Option("", "--role", help="viewer, operator or admin.  [default: admin for the first, else viewer]"),
    database: str = DATABASE,
    password_stdin: bool = STDIN,
) -> None:
    """Make a user. From the first one on everybody has to log in, except for programs with a token."""
    from edgekit.fleet.access.accounts import Accounts

    with _store(database, may_create=True) as store:
        accounts = Accounts(store)
        is_first = not accounts.has_any()
        if is_first and role not in {"", "admin"}:
            text = f"{name}: the first user is admin; otherwise nobody could make others."
            raise UsageError("access.role", text, hint="Leave --role out.")
        chosen = role or ("admin" if is_first else "viewer")
        password = _ask_password(name, is_stdin=password_stdin)
        accounts.add(name, role=chosen, password=password, actor=ACTOR, now_ms=_now_ms())
    note(f"{name} is {chosen}.")
    if is_first:
        note("From now on everybody logs in; programs use a token: edgekit fleet token create NAME")


@user_app.command("list")
def list_users(database: str = DATABASE, json: bool = JSON) -> None:
    """List users with role, last login and open sessions."""
    from edgekit.fleet.access.accounts import Accounts

    with _store(database) as store:
        found = Accounts(store).list()
    if json:
        out_json(found)
        return
    rows = [
        [user.name, user.role, user.issuer or "password", _moment(user.last_login_ms), str(user.sessions)] for user in found
    ]
    out(table(["user", "role", "logs in by", "last login, UTC", "sessions"], rows, right=[4]))
    if not rows:
        note("No user yet: whoever can open the server's loopback is admin. edgekit fleet user add NAME", "dim")


@user_app.command("passwd")
def change_password(name: str = NAME, database: str = DATABASE, password_stdin: bool = STDIN) -> None:
    """Give a user another password; all their sessions end."""
    from edgekit.fleet.access.accounts import Accounts

    with _store(database) as store:
        accounts = Accounts(store)
        accounts.known(name)
        password = _ask_password(name, is_stdin=password_stdin)
        accounts.set_password(name, password, actor=ACTOR, now_ms=_now_ms())
    note(f"{name}: the password is another one; every session has ended.")


@user_app.command("role")
def change_role(
    name: str = NAME,
    role: str = typer.Argument(..., metavar="ROLE", help="viewer, operator or admin."),
    database: str = DATABASE,
) -> None:
    """Give a user another role; it holds from the next request on."""
    from edgekit.fleet.access.accounts import Accounts

    with _store(database) as store:
        Accounts(store).set_role(name, role, actor=ACTOR, now_ms=_now_ms())
    note(f"{name} is {role}.")


@user_app.command("remove")
def remove_user(name: str = NAME, database: str = DATABASE) -> None:
    """Remove a user: sessions and tokens end, what they did stays in the audit log."""
    from edgekit.fleet.access.accounts import Accounts

    with _store(database) as store:
        Accounts(store).remove(name, actor=ACTOR, now_ms=_now_ms())
    note(f"{name} is removed.")


# --- tokens


@token_app.command("create")
def create_token(
    name: str = typer.Argument(..., metavar="NAME", help="What it is for."),
    role: str = typer.Option("viewer", "--role", help="What it may: viewer, operator or admin."),
    days: int = typer.Option(90, "--days", help="How long it holds."),
    database: str = DATABASE,
    json: bool = JSON,
) -> None:
    """Make a token for a program. It is printed this once."""
    from edgekit.fleet.access.tokens import ApiTokens

    with _store(database) as store:
        made = ApiTokens(store).create(name, role=role, days=days, actor=ACTOR, now_ms=_now_ms())
    if json:
        out_json(made)
        return
    out(made.token)
    note(f"{made.view.name}: {made.view.role}, until {_moment(made.view.expires_ms)} UTC. It is not shown again.")


@token_app.command("list")
def list_tokens(database: str = DATABASE, json: bool = JSON) -> None:
    """List tokens without their secrets."""
    from edgekit.fleet.access.tokens import ApiTokens

    with _store(database) as store:
        found = ApiTokens(store).list(_now_ms())
    if json:
        out_json(found)
        return
    rows = [
        [str(each.id), each.name, each.role, each.state, each.created_by, _moment(each.last_used_ms), _moment(each.expires_ms)]
        for each in found
    ]
    out(table(["id", "token", "role", "state", "made by", "last used, UTC", "ends, UTC"], rows, right=[0]))


@token_app.command("revoke")
def revoke_token(
    number: int = typer.Argument(..., metavar="ID", help='Its id in "edgekit fleet token list".'), database: str = DATABASE
) -> None:
    """End a token at once."""
    from edgekit.fleet.access.tokens import ApiTokens

    with _store(database) as store:
        ApiTokens(store).revoke(number, actor=ACTOR, now_ms=_now_ms())
    note(f"token {number} is revoked.")
