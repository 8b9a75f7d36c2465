"""Ask a fleet server from the command line; the token comes from the environment, never from an option.

>>> get_json("http://127.0.0.1:8420", "/api/v1/health")["is_healthy"]  # doctest: +SKIP
True
"""

from __future__ import annotations

import http.client
import json as json_module
import os
import urllib.error
import urllib.request
from typing import Any

from edgekit.errors import EnvironmentFault, UsageError

TOKEN_VARIABLE = "EDGEKIT_FLEET_TOKEN"  # noqa: S105 - the variable's name
DEFAULT_URL = "http://127.0.0.1:8420"
_WRONG_REQUEST = frozenset({400, 404, 409, 422})


def get_json(url: str, path: str) -> Any:
    """What a fleet server answers.

    Raises:
        UsageError: ``fleet.url``.
        EnvironmentFault: ``fleet.unreachable`` or ``fleet.refused``.
    """
    return send_json(url, path, None, method="GET")


def send_json(url: str, path: str, body: Any, *, method: str = "POST") -> Any:
    """Ask a fleet server to do something, and read its answer.

    Args:
        url: of the server.
        path: with the query.
        body: a record or what JSON knows; None sends none.
        method: of HTTP.

    Returns:
        The decoded JSON; None when the answer is empty.

    Raises:
        UsageError: ``fleet.url``; ``fleet.rejected`` with the server's words when it says that the request is wrong.
        EnvironmentFault: ``fleet.unreachable`` or ``fleet.refused``.
    """
    import msgspec

    text = send_bytes(url, path, None if body is None else msgspec.json.encode(body), method=method)
    try:
        return json_module.loads(text) if text else None
    except ValueError as error:
        said = f"{url}: answers something else than JSON."
        raise EnvironmentFault("fleet.refused", said, hint="Is this the fleet server's --url?") from error


def send_bytes(url: str, path: str, data: bytes | None, *, method: str = "GET", timeout_s: float = 10.0) -> bytes:
    """The same with a body of JSON that is made already, and the answer as it came. Errors as :func:`send_json`."""
    request = urllib.request.Request(url.rstrip("/") + path, data=data, method=method)  # noqa: S310 - checked below
    if data is not None:
        request.add_header("Content-Type", "application/json")
    if request.type not in {"http", "https"}:
        raise UsageError("fleet.url", f"{url}: not an http(s) URL.", hint="Give --url http://127.0.0.1:8420.")
    if token := os.environ.get(TOKEN_VARIABLE):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310 - the same
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in _WRONG_REQUEST and (said := _words_of(error)):
            raise UsageError("fleet.rejected", f"{url}: {said}") from error
        is_closed = error.code in {http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN}
        hint = f"Set the server's token in {TOKEN_VARIABLE}." if is_closed else "Is this the fleet server's --url?"
        raise EnvironmentFault("fleet.refused", f"{url}: answers {error.code} {error.reason}.", hint=hint) from error
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        raise EnvironmentFault(
            "fleet.unreachable", f"{url}: the fleet server does not answer: {reason}.", hint="Start it: edgekit fleet serve"
        ) from error


def _words_of(error: urllib.error.HTTPError) -> str:
    """What the server says of a request that it refused; empty when it says nothing for people."""
    try:
        said = json_module.loads(error.read())
    except (ValueError, OSError):
        return ""
    detail = said.get("detail") if isinstance(said, dict) else None
    return detail if isinstance(detail, str) else json_module.dumps(detail or "")[:500].strip('"')
