"""Enrolment, renewal, claims and revocation over HTTP.

Four paths are open to those who have no account: a claim or a certificate is what they show, and authorities and revocation
lists are no secrets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response

from edgekit.errors import EdgekitError
from edgekit.fleet.access.guard import Actor, require
from edgekit.fleet.exchange import Documented, answer, body_of, documented, refusal, schemas
from edgekit.fleet.identity.service import Identity
from edgekit.fleet.identity.throttle import Throttle
from edgekit.fleet.identity.views import BrokerFiles, ClaimView, IdentityPage
from edgekit.fleet.probes import READY_PATH
from edgekit.fleet.services import Services
from edgekit.schema.base import Record, decode_json
from edgekit.schema.identity import MAX_REQUEST_BYTES, ClaimMade, Enrolment, Issued, Renewal

PREFIX = "/api/v1"
OPEN_PATHS = frozenset({f"{PREFIX}/enroll", f"{PREFIX}/renew", f"{PREFIX}/ca", f"{PREFIX}/crl", READY_PATH})
"""Reached without a session or a token; each checks for itself."""
PEM_TYPE = "application/x-pem-file"


class ClaimAsked(Record, frozen=True, kw_only=True):
    """``POST /api/v1/claims``."""

    site: str
    device: str
    seconds: float = 86400.0
    labels: dict[str, str] = {}


class RevocationAsked(Record, frozen=True, kw_only=True):
    """``POST /api/v1/identities/{site}/{device}/revoke``."""

    reason: str


class RevocationMade(Record, frozen=True, kw_only=True):
    """How many certificates it ended."""

    certificates: int


_schema_of, COMPONENTS = schemas((Issued, ClaimMade, ClaimView, IdentityPage, BrokerFiles, RevocationMade))
_claim_asked, _revocation_asked = body_of(ClaimAsked), body_of(RevocationAsked)


def _documented(kind: type, *, is_list: bool = False) -> Documented:
    return documented(_schema_of[kind], kind, is_list=is_list)


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_REQUEST_BYTES:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_REQUEST_BYTES} bytes")
    return bytes(data)


def make_router(services: Services) -> APIRouter:
    """The routes over ``services.identity``."""
    router = APIRouter(prefix=PREFIX, tags=["identity"])

    def identity() -> Identity:
        found = services.identity
        if not isinstance(found, Identity):
            raise HTTPException(404, "this server has no certificate authority: start it with --authority DIR")
        return found

    _add_open(router, identity)
    _add_claims(router, identity)
    _add_identities(router, identity)
    return router


def _add_open(router: APIRouter, identity: Callable[[], Identity]) -> None:
    """What needs no account."""
    throttle = Throttle()

    def note_failure(error: EdgekitError, address: str) -> Response:
        throttle.note_failure(address, now_s=time.monotonic())
        if error.code == "identity.too_often":
            return answer({"code": error.code, "detail": error.message}, status=HTTPStatus.TOO_MANY_REQUESTS)
        return refusal(error)

    async def guarded(request: Request, kind: type[Enrolment | Renewal]) -> Response:
        """Decode and decide, outside the event loop, with patience for those who are wrong now and then."""
        address = request.client.host if request.client else "?"
        if not throttle.is_open(address, now_s=time.monotonic()):
            raise HTTPException(429, "too many refused requests; wait a minute", headers={"Retry-After": "60"})
        here, data = identity(), await _body(request)
        try:
            asked = decode_json(data, kind, name="request")
            if isinstance(asked, Enrolment):
                return answer(await asyncio.to_thread(here.enrol, asked))
            return answer(await asyncio.to_thread(here.renew, asked))
        except EdgekitError as error:
            return note_failure(error, address)

    @router.post("/enroll", responses=_documented(Issued), response_class=Response)
    async def enroll(request: Request) -> Response:
        """A claim and a request for a certificate; the certificate. The claim is the credential, and it counts once."""
        return await guarded(request, Enrolment)

    @router.post("/renew", responses=_documented(Issued), response_class=Response)
    async def renew(request: Request) -> Response:
        """The next certificate, asked for with the key of the present one."""
        return await guarded(request, Renewal)

    @router.get("/ca", response_class=Response)
    def ca() -> Response:
        """The authorities by which the fleet's servers are known, PEM; compare the fingerprint before you trust it."""
        return Response(identity().authority.servers_pem, media_type=PEM_TYPE)

    @router.get("/crl", response_class=Response)
    def crl() -> Response:
        """The revocation lists, PEM."""
        return Response(identity().crl(), media_type=PEM_TYPE, headers={"Cache-Control": "no-cache"})


def _add_claims(router: APIRouter, identity: Callable[[], Identity]) -> None:
    """Who may enrol."""

    @router.get("/broker-files", responses=_documented(BrokerFiles), response_class=Response)
    def broker_files() -> Response:
        """What a broker on another machine must know; "edgekit fleet broker-sync" fetches it."""
        return answer(BrokerFiles(acl=identity().acl(), crl=identity().crl().decode()))

    @router.post("/claims", responses=_documented(ClaimMade), response_class=Response)
    def make_claim(
        asked: Annotated[ClaimAsked, Depends(_claim_asked)], actor: Annotated[Actor, Depends(require("operator"))]
    ) -> Response:
        """Make a claim for one device. Its secret is in this answer and nowhere else."""
        here = identity()
        try:
            made = here.make_claim(asked.site, asked.device, labels=asked.labels, seconds=asked.seconds, actor=actor.name)
        except EdgekitError as error:
            return refusal(error)
        return answer(made)

    @router.get("/claims", responses=_documented(ClaimView, is_list=True), response_class=Response)
    def list_claims() -> Response:
        """The newest claims, without their secrets."""
        return answer(identity().claims())

    @router.delete("/claims/{name}", status_code=204, response_class=Response)
    def withdraw_claim(name: str, actor: Annotated[Actor, Depends(require("operator"))]) -> Response:
        """Make a claim worthless."""
        if not identity().withdraw_claim(name, actor=actor.name):
            raise HTTPException(404, f"{name[:64]}: no open claim has this id")
        return Response(status_code=204)


def _add_identities(router: APIRouter, identity: Callable[[], Identity]) -> None:
    """Who belongs to the fleet."""

    @router.get("/identities", responses=_documented(IdentityPage), response_class=Response)
    def list_identities(
        state: Annotated[str, Query(pattern="^(|valid|due|expired|revoked)$")] = "",
        search: Annotated[str, Query(max_length=64, description="part of site or device")] = "",
        after: Annotated[str, Query(max_length=140, description="next of the page before")] = "",
        limit: Annotated[int, Query(ge=1, le=1000, description="most on a page")] = 100,
    ) -> Response:
        """Devices with their newest certificates."""
        return answer(identity().page(state=state, search=search, after=after, limit=limit))

    @router.post("/identities/{site}/{device}/revoke", responses=_documented(RevocationMade), response_class=Response)
    def revoke(
        site: str,
        device: str,
        asked: Annotated[RevocationAsked, Depends(_revocation_asked)],
        actor: Annotated[Actor, Depends(require("operator"))],
    ) -> Response:
        """Shut a device out: its certificates are revoked, and it gets no others."""
        here = identity()
        try:
            count = here.revoke(site, device, reason=asked.reason, actor=actor.name)
        except EdgekitError as error:
            return refusal(error)
        return answer(RevocationMade(certificates=count))
