"""The machine-readable description of the API: what FastAPI sees, and the records that travel, which it does not.

Bodies are decoded by msgspec, so FastAPI knows neither their schema nor that of the answers; both come from the records here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from edgekit.fleet import api
from edgekit.fleet.access import api as access_api
from edgekit.fleet.alerting import api as alerting_api
from edgekit.fleet.identity import api as identity_api
from edgekit.fleet.rollout import api as rollout_api
from edgekit.fleet.watch import api as watch_api
from edgekit.fleet.watch.views import Budget
from edgekit.fleet.work import api as work_api
from edgekit.schema.identity import Enrolment, Renewal

AREAS = (api, access_api, alerting_api, identity_api, rollout_api, watch_api, work_api)
READ_BY_HAND: dict[tuple[str, str], type] = {
    ("POST", "/api/v1/enroll"): Enrolment,
    ("POST", "/api/v1/renew"): Renewal,
    ("PUT", "/api/v1/drift/{model}/budget"): Budget,
}
"""Bodies of routes that do not use :func:`edgekit.fleet.exchange.body_of`."""
SECURITY = {"token": {"type": "http", "scheme": "bearer", "description": "A token of /settings/tokens, or the server's own."}}


def _routes(routes: list[BaseRoute]) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        original = getattr(route, "original_router", None)
        if original is not None:
            yield from _routes(original.routes)


def _record_of(dependant: Dependant) -> type | None:
    """The record that a route reads from its body."""
    for each in dependant.dependencies:
        found = getattr(each.call, "record", None) or _record_of(each)
        if isinstance(found, type):
            return found
    return None


def _bodies(app: FastAPI) -> dict[tuple[str, str], type]:
    found = dict(READ_BY_HAND)
    for route in _routes(app.routes):
        kind = _record_of(route.dependant)
        if kind is not None:
            for method in route.methods or ():
                found[method, route.path] = kind
    return found


def complete(app: FastAPI) -> None:
    """Let the application's OpenAPI document name every record."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for area in AREAS:
            schemas.update(area.COMPONENTS)
        components["securitySchemes"] = SECURITY
        document["security"] = [{"token": []}]
        _add_bodies(document, _bodies(app), schemas)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _add_bodies(document: dict[str, Any], bodies: dict[tuple[str, str], type], schemas: dict[str, Any]) -> None:
    kinds = sorted(set(bodies.values()), key=lambda kind: (kind.__module__, kind.__name__))
    found, more = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas.update(more)
    schema_of = dict(zip(kinds, found, strict=True))
    for (method, path), kind in bodies.items():
        call = document["paths"].get(path, {}).get(method.lower())
        if call is not None:
            call["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema_of[kind]}}}
