"""What every page needs: the parts of the server, the renderer, and what the menu counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode

from fastapi import Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse
from sqlalchemy import func, select

from edgekit.errors import EdgekitError
from edgekit.fleet.access.guard import Actor, require
from edgekit.fleet.exchange import status_of
from edgekit.fleet.rollout.tables import rollouts
from edgekit.fleet.services import Services
from edgekit.fleet.web.rendering import Renderer
from edgekit.schema.base import Record

TALLY_S = 1.0
MAX_REASON = 1000
Operator = Annotated[Actor, Depends(require("operator"))]
Admin = Annotated[Actor, Depends(require("admin"))]


class Tally(Record, frozen=True, kw_only=True):
    """Figures beside the menu."""

    alerts: int = 0
    critical: int = 0
    rollouts: int = 0
    halted: int = 0


@dataclass
class Site:
    """The parts, and how pages are made of them."""

    services: Services
    renderer: Renderer
    monotonic: Callable[[], float] = time.monotonic
    _tally: tuple[float, Tally] = field(default=(float("-inf"), Tally()))

    def page(self, request: Request, template: str, /, *, status: int = 200, **values: Any) -> HTMLResponse:
        """Render a page."""
        return self.renderer.page(request, template, status=status, tally=self.tally(), **values)

    def tally(self) -> Tally:
        """What the menu counts, at most a second old."""
        read_s, tally = self._tally
        if self.monotonic() - read_s < TALLY_S:
            return tally
        fresh = self._count()
        self._tally = (self.monotonic(), fresh)
        return fresh

    def _count(self) -> Tally:
        alerts = self.services.alerts.open_alerts() if self.services.alerts else ()
        states = self._count_rollouts()
        return Tally(
            alerts=len(alerts),
            critical=sum(alert.level == "critical" for alert in alerts),
            rollouts=sum(states[name] for name in ("running", "paused", "rolling_back", "halted")),
            halted=states["halted"],
        )

    def _count_rollouts(self) -> Counter[str]:
        state = rollouts.c.state
        with self.services.store.read() as connection:
            found = connection.execute(select(state, func.count()).group_by(state)).all()
        return Counter({name: int(number) for name, number in found})

    def refuse(self, request: Request, status: int, text: str, *, hint: str = "", code: str = "") -> HTMLResponse:
        """An error as a page."""
        return self.page(request, "error.html", status=status, code_number=status, text=text, hint=hint, code=code)

    def refuse_error(self, request: Request, error: EdgekitError) -> HTMLResponse:
        """One of edgekit's errors as a page."""
        return self.refuse(request, status_of(error), error.message, hint=error.hint, code=error.code)


def is_page(request: Request) -> bool:
    """Whether somebody looks at the answer, rather than a program."""
    is_api = request.url.path.startswith(("/api/", "/live", "/grid", "/static/"))
    return not is_api and "text/html" in request.headers.get("accept", "")


async def read_form(request: Request) -> Mapping[str, str]:
    """The fields of a form, each once, without spaces around them; the middleware has looked at its size and token."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("application/x-www-form-urlencoded"):
        raise HTTPException(415, "expected a form: application/x-www-form-urlencoded")
    fields = parse_qs((await request.body()).decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=100)
    return {name: values[0].strip() for name, values in fields.items()}


Form = Annotated[Mapping[str, str], Depends(read_form)]


def reason_of(form: Mapping[str, str]) -> str:
    """Why somebody does something: asked for wherever others will want to know.

    Raises:
        HTTPException: 400 without one.
    """
    reason = form.get("reason", "")[:MAX_REASON]
    if not reason:
        raise HTTPException(400, "say why: the audit log keeps it for those who come after you")
    return reason


def back_to(path: str) -> RedirectResponse:
    """Show a page after a form."""
    return RedirectResponse(path, 303)


def with_query(path: str, values: Mapping[str, object]) -> str:
    """A path with what a page's state is, without what says nothing."""
    query = urlencode({name: value for name, value in values.items() if value not in {"", None, False}})
    return f"{path}?{query}" if query else path
