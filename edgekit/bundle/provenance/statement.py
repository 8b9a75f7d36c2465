"""in-toto Statements (v1) and DSSE's JSON for them: the form that provenance and the model signature share.

Only what edgekit writes is modelled; unknown fields of documents that others wrote are ignored on reading.
"""

from __future__ import annotations

import msgspec

from edgekit.schema.digest import hex_of

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"


class Document(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """A part of a foreign document: camelCase names, what is not set is left out."""


class ResourceDescriptor(Document, frozen=True, kw_only=True):
    """in-toto's name for a thing: at least one of ``uri`` and ``digest`` is set."""

    name: str = ""
    uri: str = ""
    digest: dict[str, str] = {}
    media_type: str = ""
    annotations: dict[str, str | float | int | bool] = {}


def digest_set(digest: str) -> dict[str, str]:
    """in-toto's form of one of our digests.

    >>> digest_set("sha256:" + "0" * 64)["sha256"][:4]
    '0000'
    """
    return {"sha256": hex_of(digest)}
