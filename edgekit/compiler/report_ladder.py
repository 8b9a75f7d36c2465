"""The section about the ladder, which is the search's ablation: what each refinement brought, and whether it stayed."""

from __future__ import annotations

from edgekit.compiler.markup import Markup, element, join
from edgekit.compiler.report_table import Cell, Row, table
from edgekit.compiler.report_words import MINUS, NBSP, NONE, about, decibels, signed, significant, typeset
from edgekit.compiler.result import OptimizeResult

LADDER = {
    "calibrator": "the best calibrator for each tensor",
    "scales": "weights clipped where that is nearer, by channel",
    "feedback": "rounding with error feedback",
    "bias": "biases corrected",
    "adaround": "rounding learned from the layer\u2019s outputs",
    "equalize-channels": "channels of neighbouring layers balanced",
}


def ladder(result: OptimizeResult) -> Markup | None:
    """What each refinement brought, in the order of trying, and whether it stayed."""
    steps = result.findings.ladder
    if not steps:
        return None
    head: list[Cell] = [
        ("step", None), ("before", "number"), ("after", "number"), ("change, dB", "number"), ("seconds", "number"),
        ("kept", "verdict"),
    ]  # fmt: skip
    rows: list[Row] = []
    for step in steps:
        change = None if step.before_db is None or step.score_db is None else step.score_db - step.before_db
        figures = [decibels(step.before_db), decibels(step.score_db), NONE if change is None else signed(change, 2)]
        figures.append(significant(step.seconds, 2))
        kept = element(
            "span", element("b", "\u2713 kept" if step.is_kept else "\u2717 not kept"), element("small", _reason(step.reason))
        )
        rows.append(("", [(_name(step.name), None), *((text, "number") for text in figures), (kept, "verdict")]))
    kept_steps = [step for step in steps if step.is_kept and step.before_db is not None and step.score_db is not None]
    gain = sum((step.score_db or 0.0) - (step.before_db or 0.0) for step in kept_steps)
    total = f"{len(kept_steps)} of {len(steps)} steps stayed, {signed(gain, 2)}{NBSP}dB together."
    words = "SQNR of the model\u2019s output on calibration samples that the step was not made from; what does not gain goes."
    table_ = table(head, rows, label="The ladder, step by step", class_="as-cards ladder")
    return join(element("p", total), table_, element("p", words + about(result), class_="quiet"))


def _name(step: str) -> Markup:
    """A step with what it does, and its settings where it has some: ``name(setting=value)``."""
    name, _, settings = step.partition("(")
    about_it = [words for words in (LADDER.get(name), settings.removesuffix(")")) if words]
    small = element("small", "; ".join(about_it), class_="quiet") if about_it else None
    return element("span", name, small, class_="step-name")


def _reason(reason: str) -> str:
    return typeset(reason.replace("-", MINUS, 1) if reason.startswith("-") else reason)


def remarks(result: OptimizeResult) -> Markup | None:
    """What the search had to leave out, in its own words."""
    items = [element("li", typeset(f"{note[:1].upper()}{note[1:]}.".replace("..", "."))) for note in result.findings.notes]
    return element("ul", *items, class_="notes") if items else None
