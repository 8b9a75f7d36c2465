r"""What only the owner knows: intended use, limits, owner, licence. Read from a TOML or Markdown file that the packer gives.

TOML has keys, Markdown has headings; both name the fields of :class:`Intent`, and an unknown name is refused with a hint.

    >>> parse_markdown("# Keyword spotter\n\n## Intended use\n\n- doors\n- lifts\n").intended_use
    ('doors', 'lifts')
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle.reader import Bundle
from edgekit.errors import ArtifactError, UsageError

MAX_FILE_BYTES = 256 * 1024
INTENT_PATH = "intent.json"
"""The owner's words as data, beside the card that is written from them: a later amendment takes them along."""
NOT_STATED = "not stated"
_ALIASES = {"license": "licence", "use_cases": "intended_use", "ethics": "ethical_considerations", "limits": "limitations"}


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """The owner's words, a paragraph or point each; empty is "not stated"."""

    description: tuple[str, ...] = ()
    intended_use: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    out_of_scope: tuple[str, ...] = ()
    limitations: tuple[str, ...] = ()
    ethical_considerations: tuple[str, ...] = ()
    training_data: tuple[str, ...] = ()
    evaluation_data: tuple[str, ...] = ()
    owner: tuple[str, ...] = ()
    contact: tuple[str, ...] = ()
    licence: tuple[str, ...] = ()


FIELDS = tuple(Intent.__struct_fields__)


def intent_of(bundle: Bundle) -> Intent:
    """The owner's words that a bundle carries; empty where it has none.

    Raises:
        TrustError: ``bundle.digest_mismatch``.
        ArtifactError: ``card.malformed``.
    """
    found = next((ref for ref in bundle.manifest.blobs if ref.role == "card" and ref.path == INTENT_PATH), None)
    if found is None:
        return Intent()
    if found.size_bytes > MAX_FILE_BYTES:
        raise ArtifactError("card.malformed", f"{INTENT_PATH}: larger than {MAX_FILE_BYTES} bytes.")
    try:
        return msgspec.json.decode(bundle.blob(found.digest), type=Intent)
    except msgspec.DecodeError as error:
        raise ArtifactError("card.malformed", f"{INTENT_PATH}: {error}.") from error


def load_intent(path: Path) -> Intent:
    """Read the file.

    Raises:
        UsageError: ``card.not_found``, ``card.malformed`` or ``card.unknown_field``.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1).decode("utf-8")
    except OSError as error:
        raise UsageError("card.not_found", f"{path}: cannot read this card file: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError("card.malformed", f"{path}: not UTF-8 text.") from error
    if len(text) > MAX_FILE_BYTES:
        raise UsageError("card.malformed", f"{path}: larger than {MAX_FILE_BYTES} bytes.")
    match path.suffix.lower():
        case ".toml":
            return parse_toml(text, name=str(path))
        case ".md" | ".markdown":
            return parse_markdown(text, name=str(path))
        case _:
            raise UsageError("card.malformed", f"{path}: neither .toml nor .md.", hint=f"Fields: {', '.join(FIELDS)}.")


def parse_toml(text: str, *, name: str = "card") -> Intent:
    """Keys with a text or a list of texts.

    >>> parse_toml('owner = "Ops"').owner
    ('Ops',)

    Raises:
        UsageError: ``card.malformed`` or ``card.unknown_field``.
    """
    try:
        record = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError("card.malformed", f"{name}: not TOML: {error}.") from error
    found = {}
    for key, value in record.items():
        items = value if isinstance(value, list) else _paragraphs(value) if isinstance(value, str) else [value]
        if not all(isinstance(item, str) for item in items):
            raise UsageError("card.malformed", f"{name}: {key} is not a text or a list of texts.")
        found[key] = tuple(" ".join(item.split()) for item in items if item.strip())
    return _intent(found, name)


def parse_markdown(text: str, *, name: str = "card") -> Intent:
    """Headings with paragraphs or points below them; a first heading that is no field is a title, and is left out.

    Raises:
        UsageError: ``card.unknown_field``.
    """
    found: dict[str, tuple[str, ...]] = {}
    parts = re.split(r"^#{1,6}[ \t]+(.+?)[ \t]*#*$", text, flags=re.MULTILINE)
    before, pairs = parts[0], list(zip(parts[1::2], parts[2::2], strict=True))
    title = _key(pairs[0][0]) if pairs else ""
    if pairs and title not in FIELDS and not _near(title):
        before, pairs = before + pairs[0][1], pairs[1:]
    if before.strip():
        found["description"] = tuple(_paragraphs(before))
    for heading, body in pairs:
        key = _key(heading)
        found[key] = (*found.get(key, ()), *_paragraphs(body))
    return _intent(found, name)


def _key(heading: str) -> str:
    key = re.sub(r"[^a-z0-9]+", "_", heading.lower()).strip("_")
    return _ALIASES.get(key, key)


def _paragraphs(text: str) -> list[str]:
    """Paragraphs and list points, each on one line."""
    pieces = re.split(r"\n[ \t]*\n|\n(?=[ \t]*[-*][ \t])", text.strip())
    return [" ".join(re.sub(r"^[ \t]*[-*][ \t]+", "", piece).split()) for piece in pieces if piece.strip()]


def _near(key: str) -> list[str]:
    return difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.75)


def _intent(found: Mapping[str, Any], name: str) -> Intent:
    named = {_ALIASES.get(key, key): value for key, value in found.items()}
    for key in named:
        if key not in FIELDS:
            near = _near(key)
            hint = f'Did you mean "{near[0]}"?' if near else f"Fields: {', '.join(FIELDS)}."
            raise UsageError("card.unknown_field", f"{name}: {key[:64]!r} is no field of a model card.", hint=hint)
    return Intent(**named)
