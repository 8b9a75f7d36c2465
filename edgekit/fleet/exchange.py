"""Records in and out of the API's routes: JSON checked against a record on the way in, errors with their code on the way out.

>>> answer({"number": 1}).body
b'{"number":1}'
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import msgspec
from fastapi import HTTPException, Request, Response

from edgekit.errors import ArtifactError, EdgekitError, EnvironmentFault, TrustError, UsageError

MAX_BODY_BYTES = 256 * 1024
R = TypeVar("R", bound=msgspec.Struct)
Documented = dict[int | str, dict[str, Any]]
_UNKNOWN = ".unknown"


def answer(record: Any, *, status: int = 200) -> Response:
    """A record as JSON, not to be kept by anybody on the way."""
    return Response(msgspec.json.encode(record), status, media_type="application/json", headers={"Cache-Control": "no-store"})


def status_of(error: EdgekitError) -> int:
    """The HTTP status that says who can act."""
    match error:
        case TrustError():
            return 403
        case UsageError() if error.code.endswith(_UNKNOWN):
            return 404
        case UsageError() if error.code.endswith((".busy", ".state")):
            return 409
        case UsageError() | ArtifactError():
            return 400
        case EnvironmentFault():
            return 503
        case _:
            return 500


def refusal(error: EdgekitError) -> Response:
    """An error as an answer: the code for programs, the words for people."""
    said = {"code": error.code, "detail": f"{error.message} {error.hint}".strip()}
    return answer(said, status=status_of(error))


def body_of(kind: type[R], *, max_bytes: int = MAX_BODY_BYTES) -> Callable[[Request], Awaitable[R]]:
    """A dependency that reads a request's body as a record; 413 when it is too long, 400 when it is something else."""

    async def read(request: Request) -> R:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > max_bytes:
                raise HTTPException(413, f"more than {max_bytes} bytes")
        try:
            return msgspec.json.decode(bytes(data) or b"{}", type=kind)
        except msgspec.DecodeError as error:
            raise HTTPException(400, f"the request's body: {error}") from error

    read.record = kind  # type: ignore[attr-defined]  # for the OpenAPI document
    return read


def schemas(kinds: Iterable[type]) -> tuple[dict[type, Any], dict[str, Any]]:
    """The JSON schema of each record, and the components that they refer to."""
    listed = tuple(kinds)
    found, components = msgspec.json.schema_components(listed, ref_template="#/components/schemas/{name}")
    return dict(zip(listed, found, strict=True)), components


def documented(schema: Any, kind: type, *, is_list: bool = False) -> Documented:
    """The OpenAPI response of a record."""
    content = {"type": "array", "items": schema} if is_list else schema
    return {200: {"description": (kind.__doc__ or "").splitlines()[0], "content": {"application/json": {"schema": content}}}}
