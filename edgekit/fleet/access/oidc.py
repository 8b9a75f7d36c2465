"""Login at a provider: OpenID Connect, authorization code with PKCE (RFC 7636), the provider's word on who may what.

The settings are a TOML file::

    issuer = "https://login.example.org/realms/plant"
    client_id = "edgekit"
    client_secret_file = "oidc-secret"      # or nothing, for a public client
    role_claim = "groups"
    [roles]
    fleet-admins = "admin"
    fleet-operators = "operator"
    "*" = "viewer"                          # everybody else who can log in there; without it they are refused

What a provider says is believed when its signature, issuer, audience, times and nonce are right (OpenID Connect Core 3.1.3.7);
its keys are fetched again when it signs with one that is not known. The role is read anew at each login.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import threading
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import httpx
import msgspec
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet
from sqlalchemy import delete, insert, select

from edgekit.errors import EnvironmentFault, TrustError, UsageError
from edgekit.fleet.access.guard import ROLES, Role
from edgekit.fleet.access.sessions import hash_secret
from edgekit.fleet.access.tables import oidc_flows
from edgekit.fleet.store import Store
from edgekit.loopback import is_loopback
from edgekit.schema.base import Record

_Told = TypeVar("_Told")
FLOW_MS = 10 * 60_000
KEYS_AGAIN_S = 10.0
DISCOVERY_S = 3600.0
LEEWAY_S = 60
TIMEOUT_S = 10.0
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures by a key that the provider publishes; never ``none``, never a shared secret."""


class OidcSettings(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    issuer: str
    client_id: str
    client_secret_file: str = ""
    name: str = ""
    """On the button; the issuer's host by default."""
    scopes: tuple[str, ...] = ("openid", "profile", "email")
    name_claim: str = "preferred_username"
    role_claim: str = "groups"
    roles: dict[str, Role] = {}
    redirect_url: str = ""
    """Where the provider sends people back to; by default ``/login/oidc/callback`` under the name that they opened."""


class Identity(Record, frozen=True, kw_only=True):
    """Who logged in, in the provider's words."""

    issuer: str
    subject: str
    name: str
    role: Role


class Begun(Record, frozen=True, kw_only=True):
    """A login that began: where the browser goes, and the state that its cookie keeps."""

    url: str
    state: str


class _Provider(Record, frozen=True, kw_only=True):
    """What discovery tells."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    userinfo_endpoint: str = ""


class _Tokens(Record, frozen=True, kw_only=True):
    id_token: str
    access_token: str = ""


class _Flow(Record, frozen=True, kw_only=True):
    nonce: str
    verifier: str
    next: str


def load_settings(path: Path) -> OidcSettings:
    """Read the file.

    Raises:
        UsageError: ``oidc.settings``.
    """
    try:
        settings = msgspec.convert(tomllib.loads(path.read_text()), OidcSettings)
        if settings.client_secret_file:
            secret_file = str((path.parent / settings.client_secret_file).absolute())
            settings = msgspec.structs.replace(settings, client_secret_file=secret_file)
            Path(secret_file).read_text()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        hint = "issuer and client_id are needed; docs/dashboard.md has an example."
        raise UsageError("oidc.settings", f"{path}: cannot be used: {error}.", hint=hint) from error
    _check_url(settings.issuer, "issuer")
    if not settings.roles:
        hint = 'Give [roles] with groups and admin, operator or viewer; "*" is everybody.'
        raise UsageError("oidc.settings", f"{path}: no role for anybody.", hint=hint)
    return settings


def _check_url(url: str, what: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        hint = "Only HTTPS keeps what a provider says from being forged on the way."
        raise UsageError("oidc.settings", f"{what} {url!r}: not an https:// address.", hint=hint)


class OidcLogin:
    """Logs people in at one provider. Safe to use from several threads.

    Args:
        settings: which provider, and who may what.
        store: where logins that have begun are remembered, so that any server of a group can finish them.
        monotonic: the clock of the caches, seconds.
        client: to speak with the provider.
    """

    def __init__(
        self, settings: OidcSettings, store: Store, *, monotonic: Callable[[], float], client: httpx.Client | None = None
    ) -> None:
        self.settings = settings
        self._store, self._monotonic = store, monotonic
        self._http = client or httpx.Client(timeout=TIMEOUT_S, follow_redirects=False)
        self._lock = threading.Lock()
        self._provider: tuple[float, _Provider] | None = None
        self._keys: tuple[float, KeySet] | None = None

    @property
    def label(self) -> str:
        """The provider's name for people."""
        return self.settings.name or urlsplit(self.settings.issuer).hostname or self.settings.issuer

    def begin(self, *, redirect_url: str, next_path: str, now_ms: int) -> Begun:
        """Begin a login.

        Raises:
            EnvironmentFault: ``oidc.unreachable``.
            TrustError: ``oidc.refused``.
        """
        provider = self._discover()
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
        with self._store.write() as connection:
            connection.execute(delete(oidc_flows).where(oidc_flows.c.created_ms < now_ms - FLOW_MS))
            flow = {"state_hash": hash_secret(state), "nonce": nonce, "verifier": verifier, "next": next_path[:500]}
            connection.execute(insert(oidc_flows).values(created_ms=now_ms, **flow))
        query = {
            "response_type": "code",
            "client_id": self.settings.client_id,
            "redirect_uri": self.settings.redirect_url or redirect_url,
            "scope": " ".join(self.settings.scopes),
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        separator = "&" if urlsplit(provider.authorization_endpoint).query else "?"
        return Begun(url=f"{provider.authorization_endpoint}{separator}{urlencode(query)}", state=state)

    def finish(self, given: Mapping[str, str], *, state: str, redirect_url: str, now_ms: int) -> tuple[Identity, str]:
        """Finish it: who it is, and the page that was wanted.

        Args:
            given: the query with which the provider sent the browser back.
            state: what the browser's cookie kept.
            redirect_url: as it was given to :meth:`begin`.
            now_ms: Unix time in milliseconds.

        Raises:
            TrustError: ``oidc.refused``.
            EnvironmentFault: ``oidc.unreachable``.
        """
        if not state or not secrets.compare_digest(state.encode(), given.get("state", "").encode()):
            raise _refused("the login did not begin in this browser", "Begin again at /login.")
        flow = self._take_flow(state, now_ms)
        if given.get("error"):
            raise _refused(f"{self.label} says: {given.get('error_description') or given['error']}"[:300])
        if given.get("iss", self.settings.issuer) != self.settings.issuer:
            raise _refused(f"the answer comes from {given['iss'][:100]}")
        provider = self._discover()
        tokens = self._fetch_tokens(provider, given.get("code", ""), flow, self.settings.redirect_url or redirect_url)
        claims = self._read_claims(provider, tokens, flow.nonce, now_ms)
        return self._identify(claims), flow.next

    def _take_flow(self, state: str, now_ms: int) -> _Flow:
        """The flow of a state, which counts once."""
        row = oidc_flows.c
        here = row.state_hash == hash_secret(state)
        with self._store.write() as connection:
            item = connection.execute(select(oidc_flows).where(here, row.created_ms >= now_ms - FLOW_MS)).first()
            connection.execute(delete(oidc_flows).where(here))
        if item is None:
            raise _refused("the login took too long, or was finished already", "Begin again at /login.")
        return _Flow(nonce=item.nonce, verifier=item.verifier, next=item.next)

    def _discover(self) -> _Provider:
        with self._lock:
            if self._provider and self._monotonic() - self._provider[0] < DISCOVERY_S:
                return self._provider[1]
        url = f"{self.settings.issuer.rstrip('/')}/.well-known/openid-configuration"
        found = self._decode(self._ask("GET", url), _Provider)
        if found.issuer != self.settings.issuer:
            raise _refused(f"{url} names itself {found.issuer!r}, expected was {self.settings.issuer!r}")
        for address in (found.authorization_endpoint, found.token_endpoint, found.jwks_uri):
            _check_url(address, "the provider's")
        with self._lock:
            self._provider = (self._monotonic(), found)
        return found

    def _fetch_tokens(self, provider: _Provider, code: str, flow: _Flow, redirect_url: str) -> _Tokens:
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_url,
            "client_id": self.settings.client_id,
            "code_verifier": flow.verifier,
        }
        if self.settings.client_secret_file:
            form["client_secret"] = Path(self.settings.client_secret_file).read_text().strip()
        return self._decode(self._ask("POST", provider.token_endpoint, data=form), _Tokens)

    def _read_claims(self, provider: _Provider, tokens: _Tokens, nonce: str, now_ms: int) -> dict[str, Any]:
        claims = self._verify(provider, tokens.id_token)
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        now_s = now_ms / 1000
        expected = (
            (claims.get("iss") == self.settings.issuer, "its issuer is another one"),
            (self.settings.client_id in audiences, "it is meant for somebody else"),
            (len(audiences) == 1 or claims.get("azp") == self.settings.client_id, "it was given to somebody else"),
            (_is_time(claims.get("exp")) and claims["exp"] > now_s - LEEWAY_S, "it has expired"),
            (_is_time(claims.get("iat")) and claims["iat"] < now_s + LEEWAY_S, "it is from the future"),
            (claims.get("nonce") == nonce, "it belongs to another login"),
            (isinstance(claims.get("sub"), str) and bool(claims["sub"]), "it names nobody"),
        )
        for is_met, problem in expected:
            if not is_met:
                raise _refused(f"the ID token of {self.label} does not count: {problem}")
        return self._with_user_info(provider, tokens, claims)

    def _with_user_info(self, provider: _Provider, tokens: _Tokens, claims: dict[str, Any]) -> dict[str, Any]:
        """What the ID token leaves out, asked at the provider."""
        wanted = (self.settings.name_claim, self.settings.role_claim)
        if all(name in claims for name in wanted) or not (provider.userinfo_endpoint and tokens.access_token):
            return claims
        header = {"Authorization": f"Bearer {tokens.access_token}"}
        told = self._decode(self._ask("GET", provider.userinfo_endpoint, headers=header), dict[str, Any])
        return {**told, **claims} if told.get("sub") == claims["sub"] else claims

    def _verify(self, provider: _Provider, token: str) -> dict[str, Any]:
        """The claims of a token with a good signature; with an unknown key the keys are fetched again."""
        for is_last in (False, True):
            keys = self._fetch_keys(provider, is_fresh=is_last)
            try:
                return dict(jwt.decode(token, keys, algorithms=list(ALGORITHMS)).claims)
            except (JoseError, ValueError) as error:
                if is_last:
                    raise _refused(f"the ID token of {self.label} is not signed by one of its keys: {error}") from error
        raise AssertionError("the last turn returns or raises")

    def _fetch_keys(self, provider: _Provider, *, is_fresh: bool) -> KeySet:
        with self._lock:
            known = self._keys
        age_s = self._monotonic() - known[0] if known else DISCOVERY_S
        if known and age_s < (KEYS_AGAIN_S if is_fresh else DISCOVERY_S):
            return known[1]
        data = self._decode(self._ask("GET", provider.jwks_uri), dict[str, Any])
        try:
            keys = KeySet.import_key_set({"keys": [key for key in data["keys"] if key.get("use", "sig") == "sig"]})
        except (JoseError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _refused(f"{provider.jwks_uri}: no keys that can be used: {error}") from error
        with self._lock:
            self._keys = (self._monotonic(), keys)
        return keys

    def _identify(self, claims: Mapping[str, Any]) -> Identity:
        named = claims.get(self.settings.name_claim) or claims.get("email") or claims["sub"]
        told = claims.get(self.settings.role_claim, ())
        groups = {told} if isinstance(told, str) else {item for item in told if isinstance(item, str)}
        roles = [role for group, role in self.settings.roles.items() if group == "*" or group in groups]
        if not roles:
            text = f"{named}: none of the groups that {self.label} tells may see this fleet"
            raise _refused(
                text, f"An admin gives a role to one of them in [roles]: {', '.join(sorted(groups)) or 'none told'}."
            )
        role = max(roles, key=ROLES.index)
        return Identity(issuer=self.settings.issuer, subject=str(claims["sub"])[:256], name=str(named)[:64], role=role)

    def _ask(self, method: str, url: str, **options: Any) -> bytes:
        try:
            answer = self._http.request(
                method, url, headers={"Accept": "application/json", **options.pop("headers", {})}, **options
            )
        except httpx.HTTPError as error:
            text = f"{self.label}: {url} does not answer: {error or type(error).__name__}."
            raise EnvironmentFault("oidc.unreachable", text, hint="Try again, or log in with a password.") from error
        if answer.status_code != httpx.codes.OK:
            said = answer.text[:200].replace("\n", " ")
            raise _refused(f"{self.label}: {url} answers {answer.status_code}: {said}")
        return answer.content

    def _decode(self, data: bytes, kind: type[_Told]) -> _Told:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError as error:
            raise _refused(f"{self.label} answers what cannot be understood: {error}") from error


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refused(text: str, hint: str = "") -> TrustError:
    return TrustError("oidc.refused", f"{text}.", hint=hint)
