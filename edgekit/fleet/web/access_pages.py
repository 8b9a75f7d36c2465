"""The pages about access: login and logout, one's own password and sessions, tokens, and for admins the users."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from edgekit.errors import EdgekitError, UsageError
from edgekit.fleet.access.gate import (
    TOKEN_COOKIE,
    address_of,
    drop_session,
    is_here,
    is_secure,
    keep_session,
    local_path,
    session_cookie,
)
from edgekit.fleet.access.guard import ROLES, Actor, actor_of
from edgekit.fleet.access.service import Access, LoginError
from edgekit.fleet.access.views import TokenMade
from edgekit.fleet.api import now_ms
from edgekit.fleet.web.frame import Admin, Form, Site, back_to

STATE_COOKIE = "edgekit-oidc"
STATE_S = 600
CALLBACK = "/login/oidc/callback"
_Next = Annotated[str, Query(max_length=500)]


def _access(site: Site) -> Access:
    found = site.services.access
    assert isinstance(found, Access)
    return found


def _agent(request: Request) -> str:
    return request.headers.get("user-agent", "")[:200]


def _callback_url(request: Request) -> str:
    return f"{request.url.scheme}://{request.headers.get('host', '')}{CALLBACK}"


def _me(request: Request) -> Actor:
    actor = actor_of(request)
    if actor is None:
        raise HTTPException(401, "log in first")
    return actor


def make_router(site: Site) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)
    _add_login(router, site)
    _add_oidc(router, site)
    _add_account(router, site)
    _add_tokens(router, site)
    _add_users(router, site)
    return router


def _login_page(site: Site, request: Request, next_path: str, *, problem: str = "", status: int = 200) -> HTMLResponse:
    access = _access(site)
    return site.renderer.page(
        request,
        "login.html",
        status=status,
        next_path=local_path(next_path),
        problem=problem,
        has_passwords=access.accounts.has_any(),
        has_token=bool(access.server_token),
        provider=access.oidc.label if access.oidc else "",
        is_plain=not is_secure(request) and not is_here(request),
    )


def _add_login(router: APIRouter, site: Site) -> None:
    access = _access(site)

    @router.get("/login", response_class=HTMLResponse)
    def login(request: Request, next: _Next = "/") -> Response:  # noqa: A002 - the query's own word
        if actor_of(request) is not None:
            return RedirectResponse(local_path(next), 303)
        return _login_page(site, request, next)

    @router.post("/login")
    async def log_in(request: Request, form: Form) -> Response:
        wanted = form.get("next", "/")
        if not is_secure(request) and not is_here(request):
            text = "This connection is not encrypted: a password would be read on the way. Open this server over https."
            return _login_page(site, request, wanted, problem=text, status=400)
        if "token" in form:
            return _take_token(site, request, form["token"], wanted)
        try:
            secret = await asyncio.to_thread(
                access.log_in,
                form.get("name", "")[:64],
                form.get("password", ""),
                address=address_of(request),
                agent=_agent(request),
                now_ms=now_ms(),
                replaces=request.cookies.get(session_cookie(request), ""),
            )
        except LoginError as error:
            page = _login_page(site, request, wanted, problem=error.message, status=429 if error.wait_s else 401)
            if error.wait_s:
                page.headers["Retry-After"] = f"{error.wait_s:.0f}"
            return page
        response = RedirectResponse(local_path(wanted), 303)
        keep_session(request, response, secret)
        return response

    @router.post("/logout")
    def log_out(request: Request) -> Response:
        secret = request.cookies.get(session_cookie(request), "")
        if secret:
            access.log_out(secret, name=_me(request).name, now_ms=now_ms())
        response = RedirectResponse("/login", 303)
        drop_session(request, response)
        response.headers["Clear-Site-Data"] = '"cache"'
        return response


def _take_token(site: Site, request: Request, token: str, wanted: str) -> Response:
    access = _access(site)
    key = "token"
    wait_s = access.throttle.wait_s(key, address_of(request), now_s=site.monotonic())
    if wait_s:
        return _login_page(site, request, wanted, problem=f"Too many attempts failed. Wait {wait_s:.0f} s.", status=429)
    if not access.is_server_token(token):
        access.throttle.note_failure(key, address_of(request), now_s=site.monotonic())
        return _login_page(site, request, wanted, problem="This is not the server's token.", status=401)
    response = RedirectResponse(local_path(wanted), 303)
    response.set_cookie(TOKEN_COOKIE, token, httponly=True, secure=is_secure(request), samesite="strict", max_age=30 * 86_400)
    return response


def _add_oidc(router: APIRouter, site: Site) -> None:
    access = _access(site)

    @router.get("/login/oidc")
    def begin(request: Request, next: _Next = "/") -> Response:  # noqa: A002 - the query's own word
        if access.oidc is None:
            raise HTTPException(404, "this server knows no login provider: start it with --oidc FILE")
        begun = access.oidc.begin(redirect_url=_callback_url(request), next_path=local_path(next), now_ms=now_ms())
        response = RedirectResponse(begun.url, 303, headers={"Cache-Control": "no-store"})
        response.set_cookie(
            STATE_COOKIE, begun.state, max_age=STATE_S, path="/login", httponly=True, secure=is_secure(request), samesite="lax"
        )
        return response

    @router.get(CALLBACK)
    def finish(request: Request) -> Response:
        try:
            secret, wanted = access.finish_oidc(
                dict(request.query_params),
                state=request.cookies.get(STATE_COOKIE, ""),
                redirect_url=_callback_url(request),
                address=address_of(request),
                agent=_agent(request),
                now_ms=now_ms(),
                replaces=request.cookies.get(session_cookie(request), ""),
            )
        except EdgekitError as error:
            return _login_page(site, request, "/", problem=f"{error.message} {error.hint}".strip(), status=403)
        response = RedirectResponse(local_path(wanted), 303)
        keep_session(request, response, secret)
        response.delete_cookie(STATE_COOKIE, path="/login")
        return response


def _settings(
    site: Site, request: Request, *, problem: str = "", made: TokenMade | None = None, said: str = ""
) -> HTMLResponse:
    """One's account, tokens, and for admins everybody's."""
    access, actor, now = _access(site), _me(request), now_ms()
    user_id = request.state.user_id
    is_admin = actor.may("admin")
    secret = request.cookies.get(session_cookie(request), "")
    users = access.accounts.list()
    return site.page(
        request,
        "settings.html",
        status=400 if problem else 200,
        problem=problem,
        said=said,
        made=made,
        me=next((user for user in users if user.name == actor.name), None) if user_id else None,
        sessions=access.sessions.list(user_id, current=secret, now_ms=now) if user_id else (),
        tokens=access.tokens.list(now, owner=None if is_admin else (user_id or -1)),
        users=users if is_admin else (),
        roles=ROLES[: ROLES.index(actor.role) + 1],
        is_open=access.is_open(),
    )


def _add_account(router: APIRouter, site: Site) -> None:
    access = _access(site)

    @router.get("/settings", response_class=HTMLResponse)
    def settings(request: Request) -> HTMLResponse:
        return _settings(site, request)

    @router.get("/settings/tokens", response_class=HTMLResponse)
    def tokens(request: Request) -> HTMLResponse:
        return _settings(site, request)

    @router.post("/settings/password")
    async def password(request: Request, form: Form) -> Response:
        me = _me(request)
        if request.state.user_id is None:
            raise HTTPException(400, f"{me.name}: is no user with a password")
        if form.get("new") != form.get("again"):
            return _settings(site, request, problem="The new password was typed in two ways.")
        address, now = address_of(request), now_ms()
        try:
            secret = await asyncio.to_thread(
                access.change_password,
                me.name,
                form.get("old", ""),
                form.get("new", ""),
                address=address,
                agent=_agent(request),
                now_ms=now,
            )
        except UsageError as error:
            return _settings(site, request, problem=f"{error.message} {error.hint}".strip())
        response = back_to("/settings")
        keep_session(request, response, secret)
        return response

    @router.post("/settings/sessions/end")
    def end_sessions(request: Request) -> Response:
        if request.state.user_id is not None:
            access.end_other_sessions(
                request.state.user_id, _me(request).name, but=request.cookies.get(session_cookie(request), ""), now_ms=now_ms()
            )
        return back_to("/settings")


def _add_tokens(router: APIRouter, site: Site) -> None:
    access = _access(site)

    @router.post("/settings/tokens", response_class=HTMLResponse)
    def create(request: Request, form: Form) -> HTMLResponse:
        actor = _me(request)
        try:
            days = int(form.get("days", "") or 90)
        except ValueError:
            return _settings(site, request, problem=f"{form['days'][:20]!r}: not a number of days.")
        try:
            made = access.create_token(
                form.get("name", ""), role=form.get("role", ""), days=days, actor=actor, now_ms=now_ms(),
                user_id=request.state.user_id,
            )  # fmt: skip
        except UsageError as error:
            return _settings(site, request, problem=f"{error.message} {error.hint}".strip())
        return _settings(site, request, made=made)

    @router.post("/settings/tokens/{number}/revoke")
    def revoke(request: Request, number: int) -> Response:
        actor = _me(request)
        owner = None if actor.may("admin") else (request.state.user_id or -1)
        access.tokens.revoke(number, actor=actor.name, now_ms=now_ms(), owner=owner)
        return back_to("/settings/tokens")


def _add_users(router: APIRouter, site: Site) -> None:
    accounts = _access(site).accounts

    @router.post("/settings/users")
    async def add(request: Request, actor: Admin, form: Form) -> Response:
        role = "admin" if not accounts.has_any() else form.get("role", "viewer")
        try:
            await asyncio.to_thread(
                accounts.add,
                form.get("name", ""),
                role=role,
                password=form.get("password", ""),
                actor=actor.name,
                now_ms=now_ms(),
            )
        except UsageError as error:
            return _settings(site, request, problem=f"{error.message} {error.hint}".strip())
        return back_to("/settings")

    @router.post("/settings/users/{name}/{verb}")
    async def change(request: Request, name: str, verb: str, actor: Admin, form: Form) -> Response:
        now = now_ms()
        try:
            match verb:
                case "role":
                    accounts.set_role(name, form.get("role", ""), actor=actor.name, now_ms=now)
                case "password":
                    await asyncio.to_thread(accounts.set_password, name, form.get("password", ""), actor=actor.name, now_ms=now)
                case "remove":
                    accounts.remove(name, actor=actor.name, now_ms=now)
                case _:
                    raise HTTPException(404, f"{verb[:40]}: expected role, password or remove")
        except UsageError as error:
            return _settings(site, request, problem=f"{error.message} {error.hint}".strip())
        return back_to("/settings")
