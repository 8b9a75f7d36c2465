"""Access as the server uses it: who a request comes from, logging in and out.

``Access`` decides nothing about a route; :mod:`edgekit.fleet.access.guard` does, with the actor that is found here.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgekitError, UsageError
from edgekit.fleet import audit
from edgekit.fleet.access.accounts import Account, Accounts
from edgekit.fleet.access.guard import LOCAL, Actor
from edgekit.fleet.access.oidc import OidcLogin, load_settings
from edgekit.fleet.access.sessions import Sessions
from edgekit.fleet.access.throttle import LoginThrottle
from edgekit.fleet.access.tokens import ApiTokens
from edgekit.fleet.access.views import TokenMade
from edgekit.fleet.store import Store


@dataclass(frozen=True)
class Found:
    """Who a request comes from. ``cookie_secret`` is what it came with, when a browser sent that by itself."""

    actor: Actor
    cookie_secret: str = ""
    user_id: int | None = None


class LoginError(UsageError):
    """A login that did not succeed; ``wait_s`` until the next one is looked at."""

    def __init__(self, message: str, *, wait_s: float = 0.0) -> None:
        super().__init__("access.login", message)
        self.wait_s = wait_s


class Access:
    """The accounts, sessions and tokens of one server.

    Args:
        store: where they are.
        token: the server's own token from its environment; empty for none.
        oidc: settings of a provider, a file; empty for none.
        may_be_open: the server listens on loopback only, so that as long as nobody has an account nobody needs one.
        monotonic: a steady clock, seconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        token: str = "",
        oidc: str = "",
        may_be_open: bool = True,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._monotonic, self._may_be_open = store, monotonic, may_be_open
        self.server_token = token
        self.accounts = Accounts(store)
        self.sessions = Sessions(store)
        self.tokens = ApiTokens(store)
        self.throttle = LoginThrottle()
        self.oidc = OidcLogin(load_settings(Path(oidc)), store, monotonic=monotonic) if oidc else None

    def is_open(self) -> bool:
        """Whether nobody has to log in, which holds on loopback only."""
        return self._may_be_open and not self.server_token and self.oidc is None and not self.accounts.has_any()

    def has_accounts(self) -> bool:
        """Whether somebody can log in by name."""
        return self.oidc is not None or self.accounts.has_any()

    def find(self, *, bearer: str, session: str, token_cookie: str, now_ms: int) -> Found | None:
        """Who a request comes from; None for nobody. A bearer that does not hold is nobody, whatever else came with it."""
        if bearer:
            if self.is_server_token(bearer):
                return Found(Actor(name="token", role="admin"))
            actor = self.tokens.find(bearer, now_ms)
            return Found(actor) if actor else None
        if session and (found := self.sessions.find(session, now_ms)):
            return Found(Actor(name=found.name, role=found.role), cookie_secret=session, user_id=found.user_id)
        if token_cookie and self.is_server_token(token_cookie):
            return Found(Actor(name="token", role="admin"), cookie_secret=token_cookie)
        return Found(LOCAL) if self.is_open() else None

    def is_server_token(self, given: str) -> bool:
        """Whether this is the token from the server's environment."""
        return bool(self.server_token) and hmac.compare_digest(given.encode(), self.server_token.encode())

    def log_in(self, name: str, password: str, *, address: str, agent: str, now_ms: int, replaces: str = "") -> str:
        """Check a password and begin a session; its id.

        Raises:
            LoginError: the password is wrong, or too many were.
        """
        is_known = bool(name) and self.accounts.last_address(name) == address
        wait_s = self.throttle.wait_s(name, address, now_s=self._monotonic(), is_known_address=is_known)
        if wait_s:
            raise LoginError(f"Too many attempts failed. The next one counts in {wait_s:.0f} s.", wait_s=wait_s)
        account = self.accounts.authenticate(name, password)
        if account is None:
            self.throttle.note_failure(name, address, now_s=self._monotonic())
            self._note("login.failed", name or "nobody", {"address": address}, now_ms)
            raise LoginError("Name and password do not fit together.")
        self.throttle.note_success(name, address)
        return self._begin(account, address=address, agent=agent, now_ms=now_ms, replaces=replaces, way="password")

    def _begin(self, account: Account, *, address: str, agent: str, now_ms: int, replaces: str, way: str) -> str:
        with self._store.write():
            self._note("login.succeeded", account.name, {"address": address, "way": way}, now_ms)
            return self.sessions.start(account.id, address=address, agent=agent, now_ms=now_ms, replaces=replaces)

    def finish_oidc(
        self, given: Mapping[str, str], *, state: str, redirect_url: str, address: str, agent: str, now_ms: int, replaces: str
    ) -> tuple[str, str]:
        """Begin a session for whom the provider vouches for; its id, and the page that was wanted.

        Raises:
            TrustError: ``oidc.refused``.
            EnvironmentFault: ``oidc.unreachable``.
            UsageError: ``access.taken`` and others of the account.
        """
        if self.oidc is None:
            raise UsageError("access.login", "this server knows no login provider.", hint="Start it with --oidc FILE.")
        try:
            who, wanted = self.oidc.finish(given, state=state, redirect_url=redirect_url, now_ms=now_ms)
            account = self.accounts.from_elsewhere(
                issuer=who.issuer, subject=who.subject, name=who.name, role=who.role, now_ms=now_ms
            )
        except EdgekitError as error:
            self._note("login.failed", self.oidc.label, {"address": address, "code": error.code}, now_ms, reason=error.message)
            raise
        way = self.oidc.label
        return self._begin(account, address=address, agent=agent, now_ms=now_ms, replaces=replaces, way=way), wanted

    def log_out(self, session: str, *, name: str, now_ms: int) -> None:
        """End a session."""
        self.sessions.end(session)
        self._note("login.ended", name, {}, now_ms)

    def change_password(self, name: str, old: str, new: str, *, address: str, agent: str, now_ms: int) -> str:
        """Give oneself another password; every other session ends, and this one gets a new id.

        Raises:
            LoginError: the old one is wrong, or too many were.
            UsageError: ``access.password``.
        """
        wait_s = self.throttle.wait_s(name, address, now_s=self._monotonic(), is_known_address=True)
        if wait_s:
            raise LoginError(f"Too many attempts failed. The next one counts in {wait_s:.0f} s.", wait_s=wait_s)
        account = self.accounts.authenticate(name, old)
        if account is None:
            self.throttle.note_failure(name, address, now_s=self._monotonic())
            raise LoginError("The present password is another one.")
        self.accounts.set_password(name, new, actor=name, now_ms=now_ms)
        return self.sessions.start(account.id, address=address, agent=agent, now_ms=now_ms)

    def end_other_sessions(self, user_id: int, name: str, *, but: str, now_ms: int) -> None:
        """Log an account out everywhere else."""
        ended = self.sessions.end_all(user_id, but=but)
        self._note("session.ended", name, {"sessions": ended}, now_ms)

    def create_token(self, name: str, *, role: str, days: int, actor: Actor, now_ms: int, user_id: int | None) -> TokenMade:
        """Make a token for whoever asks, with no more than his own role.

        Raises:
            UsageError: ``access.role``, ``access.token``.
        """
        owner = Account(id=user_id, name=actor.name, role=actor.role) if user_id is not None else None
        return self.tokens.create(name, role=role, days=days, actor=actor.name, now_ms=now_ms, owner=owner, at_most=actor.role)

    def _note(self, action: str, name: str, fields: Mapping[str, str | int], now_ms: int, *, reason: str = "") -> None:
        with self._store.write() as connection:
            subject = f"user:{name}"[:200]
            audit.record(
                connection, actor=name[:64], action=action, subject=subject, reason=reason, fields=fields, now_ms=now_ms
            )
