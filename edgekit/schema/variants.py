"""What one run of ``edgekit optimize`` for several targets made: the list that ``edgekit bundle pack`` reads."""

from __future__ import annotations

from edgekit.schema.base import SCHEMA_VERSION, Record

VARIANTS_FILE = "variants.json"


class MadeVariant(Record, frozen=True, kw_only=True):
    """The result for one target."""

    target: str
    folder: str
    """Relative to the list: an output folder with its own candidate and report."""
    candidate: str
    is_budget_met: bool


class VariantList(Record, frozen=True, kw_only=True):
    """The results in the order of the targets that were given."""

    variants: tuple[MadeVariant, ...]
    schema_version: int = SCHEMA_VERSION
