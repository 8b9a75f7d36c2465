"""Templates and static files, and how figures and times are written for people.

Every page has a strict content security policy (no inline script or style); everything that a device or a person said is
escaped by the templates. Static files have their content's hash in the address, are cached for ever and compressed once.

>>> format_number(1234.5, 1), ago(0, 61_000), format_span(90_000)
('1\u202f234.5', '1\u202fmin ago', '1.5\u202fmin')
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2
from fastapi import HTTPException, Request, Response
from fastapi.responses import HTMLResponse

from edgekit.fleet.access.guard import actor_of
from edgekit.fleet.access.sessions import csrf_token
from edgekit.fleet.api import now_ms
from edgekit.fleet.web import drawing

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; "
    "form-action 'self'; base-uri 'none'; object-src 'none'; frame-ancestors 'none'"
)
_IMMUTABLE = "public, max-age=31536000, immutable"
_SPANS = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1000, "s"))
_THIN = "\u202f"


def format_number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure for people; a dash where there is none."""
    if value is None:
        return "–"
    text = f"{value:,.{digits}f}".replace(",", _THIN)
    return f"{text}{_THIN}{unit}" if unit else text


def format_share(value: float | None, digits: int = 1) -> str:
    """A share as percent; what is not zero never reads as zero."""
    if value is None:
        return "–"
    smallest = 10.0**-digits
    percent = round(100 * value, digits) + 0.0
    if value > 0 and not percent:
        return f"<{_THIN}{smallest:.{digits}f}{_THIN}%"
    return f"{percent:.{digits}f}{_THIN}%"


def sentence(text: str) -> str:
    """A text with its first letter large."""
    return text[:1].upper() + text[1:]


def format_bytes(value: float | None) -> str:
    """A size in the unit that fits, powers of 1000."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.{0 if value >= 100 * size else 1}f}{_THIN}{unit}"
    return f"{value:.0f}{_THIN}B"


def format_span(milliseconds: float | None) -> str:
    """A length of time in the largest unit that fits."""
    if milliseconds is None:
        return "–"
    for size, unit in _SPANS:
        if abs(milliseconds) >= size:
            return f"{milliseconds / size:.1f}".removesuffix(".0") + _THIN + unit
    return f"{milliseconds:.0f}{_THIN}ms"


def ago(time_ms: int, now: int) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0, (now - time_ms) // 1000)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size}{_THIN}{unit} ago"
    return f"{seconds}{_THIN}s ago"


def absolute(time_ms: int) -> str:
    """A moment as text that sorts, UTC."""
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "at no known time"


class StaticFiles:
    """The files below ``static/``, read once."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._packed: dict[str, bytes] = {}
        self._walk(resources.files("edgekit.fleet.web") / "static", "")
        state = hashlib.sha256()
        for name in sorted(self._files):
            state.update(name.encode() + b"\0" + self._files[name])
        self.digest = state.hexdigest()[:12]

    def _walk(self, folder: Any, prefix: str) -> None:
        for item in folder.iterdir():
            if item.is_dir():
                self._walk(item, f"{prefix}{item.name}/")
                continue
            data = item.read_bytes()
            self._files[f"{prefix}{item.name}"] = data
            self._packed[f"{prefix}{item.name}"] = gzip.compress(data, 9, mtime=0)

    def path(self, name: str) -> str:
        """The address of a file.

        Raises:
            KeyError: there is none of this name, which is a mistake in a template.
        """
        self._files[name]
        return f"/static/{self.digest}/{name}"

    def answer(self, request: Request, digest: str, path: str) -> Response:
        """A file as an answer."""
        data = self._files.get(path)
        if data is None:
            raise HTTPException(404, f"{path[:100]}: no such file")
        headers = {"Cache-Control": _IMMUTABLE if digest == self.digest else "no-cache", "Vary": "Accept-Encoding"}
        packed = self._packed[path]
        if len(packed) < len(data) and "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            data = packed
        return Response(data, media_type=mimetypes.guess_type(path)[0] or "application/octet-stream", headers=headers)


class Renderer:
    """Renders templates.

    Args:
        static: the files that pages refer to.
        version: of edgekit, in the footer.
    """

    def __init__(self, static: StaticFiles, *, version: str) -> None:
        self.static = static
        self._environment = jinja2.Environment(
            loader=jinja2.PackageLoader("edgekit.fleet.web"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.globals.update(asset=static.path, version=version, draw=drawing)
        self._environment.filters.update(
            number=format_number,
            share=format_share,
            bytes=format_bytes,
            span=format_span,
            ago=ago,
            absolute=absolute,
            sentence=sentence,
        )

    def page(self, request: Request, template: str, /, *, status: int = 200, **values: Any) -> HTMLResponse:
        """A page or a fragment for whoever asks."""
        secret = getattr(request.state, "cookie_secret", "")
        common = {
            "now": now_ms(),
            "actor": actor_of(request),
            "has_session": bool(secret),
            "csrf": csrf_token(secret) if secret else "",
            "path": request.url.path,
            "query": request.url.query,
        }
        text = self._environment.get_template(template).render({**common, **values})
        return HTMLResponse(text, status, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})
