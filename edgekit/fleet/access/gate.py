"""What every request passes before it reaches a route: its host, its actor, its origin, and the headers of its answer.

- Nobody gets anything but the login, the static files and the paths that check for themselves (enrolment).
- GET needs an actor. What changes something needs more than a viewer, except for one's own session; the route says what.
- A request that changes something and comes from a browser comes from a page of this server: its ``Origin`` or
  ``Sec-Fetch-Site`` says so, and with a cookie it carries the session's token, in the form's ``csrf`` or in ``X-CSRF-Token``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

from edgekit.fleet.access.service import Access, Found
from edgekit.fleet.access.sessions import is_csrf_token
from edgekit.loopback import is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_COOKIE = "edgekit-token"  # noqa: S105 - the cookie's name
SESSION_COOKIE = "edgekit-session"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
PUBLIC_PREFIXES = ("/static/", "/login")
OWN_PATHS = ("/logout", "/settings/")
"""A viewer's own session, password and tokens."""
MAX_FORM_BYTES = 256 * 1024
COOKIE_S = 7 * 86_400
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
TRANSPORT_SECURITY = "max-age=31536000"


def is_secure(request: Request) -> bool:
    """Whether the browser came over TLS, as far as the server or its proxy can tell."""
    return request.url.scheme == "https"


def is_here(request: Request) -> bool:
    """Whether the browser runs on this machine."""
    return is_loopback(request.url.hostname or "")


def session_cookie(request: Request) -> str:
    """The session cookie's name: over TLS one that no other host and no plain connection can set."""
    return f"__Host-{SESSION_COOKIE}" if is_secure(request) else SESSION_COOKIE


def keep_session(request: Request, response: Response, secret: str) -> None:
    """Put a session into the browser's cookie; Secure everywhere but on this machine."""
    response.set_cookie(
        session_cookie(request),
        secret,
        max_age=COOKIE_S,
        path="/",
        httponly=True,
        secure=is_secure(request) or not is_here(request),
        samesite="lax",
    )


def drop_session(request: Request, response: Response) -> None:
    """Take it out."""
    for name in (session_cookie(request), TOKEN_COOKIE):
        response.delete_cookie(name, path="/", httponly=True, secure=is_secure(request), samesite="lax")


def address_of(request: Request) -> str:
    """Where a request comes from."""
    return request.client.host if request.client else "?"


def local_path(text: str) -> str:
    """A path of this server to go on to; the overview for anything else."""
    parts = urlsplit(text)
    is_own = text.startswith("/") and not text.startswith(("//", "/\\")) and not parts.netloc and not parts.scheme
    return text if is_own and text.isprintable() else "/"


class Gate:
    """The middleware.

    Args:
        app: what comes after it.
        access: who is who.
        allowed_hosts: names besides loopback's under which the server may be opened while nobody has to log in.
        open_paths: paths that check for themselves.
    """

    def __init__(
        self, app: ASGIApp, *, access: Access, allowed_hosts: Collection[str] = (), open_paths: Collection[str] = ()
    ) -> None:
        self._app, self._access = app, access
        self._allowed_hosts, self._open_paths = frozenset(allowed_hosts), frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request = Request(scope, receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if is_secure(request):
                    headers.setdefault("Strict-Transport-Security", TRANSPORT_SECURITY)
            await send(message)

        body = _Body(receive)
        refusal = await self._check(request, body)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, body.receive, send_with_headers)

    async def _check(self, request: Request, body: _Body) -> Response | None:
        """The answer to a request that goes no further; None for one that does."""
        if request.url.path in self._open_paths:
            return None
        is_change = request.method not in SAFE_METHODS
        if is_change and not _is_same_origin(request):
            return _refuse(request, 403, "the request comes from another site; open this server's own pages")
        found = await asyncio.to_thread(self._find, request)
        if found is not None and found.actor.name == "local" and not self._is_known_host(request):
            return PlainTextResponse("421: not opened under this name; start the server with --allow-host NAME\n", 421)
        request.state.actor = found.actor if found else None
        request.state.cookie_secret = found.cookie_secret if found else ""
        request.state.user_id = found.user_id if found else None
        if request.url.path.startswith(PUBLIC_PREFIXES):
            return None
        if found is None:
            return self._ask_in(request)
        return await self._check_change(request, found, body) if is_change else None

    def _find(self, request: Request) -> Found | None:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        return self._access.find(
            bearer=bearer.strip() if scheme.lower() == "bearer" else "",
            session=request.cookies.get(session_cookie(request), ""),
            token_cookie=request.cookies.get(TOKEN_COOKIE, ""),
            now_ms=time.time_ns() // 1_000_000,
        )

    def _is_known_host(self, request: Request) -> bool:
        """Whether the browser asked for this machine by a name that is ours.

        Where nobody logs in, loopback is the only guard. A foreign page could get past it with a name of its own that resolves
        to 127.0.0.1 (DNS rebinding), but not without that name in the Host header.
        """
        try:
            return is_here(request) or (request.url.hostname or "") in self._allowed_hosts
        except ValueError:
            return False

    def _ask_in(self, request: Request) -> Response:
        """Send a person to the login, and tell a program what to give."""
        given = request.query_params.get("token", "")
        if given and self._access.is_server_token(given):
            return _keep_token(request, given)
        is_page = "text/html" in request.headers.get("accept", "") and request.method in SAFE_METHODS
        if is_page and not request.url.path.startswith(("/api/", "/fragments/", "/live")):
            wanted = quote(request.url.path + (f"?{request.url.query}" if request.url.query else ""))
            return RedirectResponse(f"/login?next={wanted}", 303, headers={"Cache-Control": "no-store"})
        text = "log in at /login, or give a token: Authorization: Bearer TOKEN, or open /?token=TOKEN"
        return _refuse(request, 401, text)

    async def _check_change(self, request: Request, found: Found, body: _Body) -> Response | None:
        if not found.actor.may("operator") and not request.url.path.startswith(OWN_PATHS):
            return _refuse(request, 403, f"{found.actor.name} is viewer: this needs operator")
        if not found.cookie_secret:
            return None
        given = request.headers.get("x-csrf-token", "")
        if not given and request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            if not await body.read(MAX_FORM_BYTES):
                return _refuse(request, 413, f"a form of more than {MAX_FORM_BYTES} bytes")
            given = parse_qs(body.data.decode("utf-8", "replace")).get("csrf", [""])[0]
        if not is_csrf_token(found.cookie_secret, given):
            return _refuse(request, 403, "the page is from an earlier session; load it again and repeat what you did")
        return None


class _Body:
    """A request's body that can be read before it is passed on."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_read = False
        self._is_given = False
        self.data = b""

    async def read(self, limit: int) -> bool:
        """Read all of it; False when it is longer."""
        while True:
            message = await self._receive()
            self.data += message.get("body", b"")
            if len(self.data) > limit:
                return False
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                self._is_read = True
                return True

    async def receive(self) -> Message:
        """What the application gets."""
        if self._is_read and not self._is_given:
            self._is_given = True
            return {"type": "http.request", "body": self.data, "more_body": False}
        return await self._receive()


def _is_same_origin(request: Request) -> bool:
    """Whether a change comes from a page of this server or from no page at all."""
    origin = request.headers.get("origin")
    if origin is not None:
        return urlsplit(origin).netloc.lower() == request.headers.get("host", "").lower()
    return request.headers.get("sec-fetch-site", "none") in {"same-origin", "none"}


def _keep_token(request: Request, token: str) -> Response:
    """Keep the server's token in a cookie, out of the address bar and the history."""
    response = RedirectResponse("/" + request.url.path.lstrip("/"), 303, headers={"Cache-Control": "no-store"})
    response.set_cookie(TOKEN_COOKIE, token, httponly=True, secure=is_secure(request), samesite="strict", max_age=30 * 86_400)
    return response


def _refuse(request: Request, status: int, text: str) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if request.url.path.startswith("/api/"):
        return JSONResponse({"detail": f"{status}: {text}"}, status, headers=headers)
    return PlainTextResponse(f"{status}: {text}\n", status, headers=headers)
