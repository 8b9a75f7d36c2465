"""Add the evidence to a draft: provenance, bill of materials, model card. The model signature comes last (:mod:`oms`).

    >>> draft = attach_evidence(draft, intent=load_intent(path), data=data, open_session=open_session)  # doctest: +SKIP
    >>> draft = sign_files(seal_models(draft, recipients), key)                                          # doctest: +SKIP

Evidence names the contents, so it is added before a draft is sealed and stays true; the model signature covers the files as
they travel, so it is added after.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from edgekit.bundle.provenance.bom import BOM_PATH, write_bom
from edgekit.bundle.provenance.card import HTML_PATH, MARKDOWN_PATH, compose_card
from edgekit.bundle.provenance.card_html import render_html
from edgekit.bundle.provenance.card_markdown import render_markdown
from edgekit.bundle.provenance.facts import EVIDENCE_ROLES, ReleaseFacts, gather_variants, reader_of
from edgekit.bundle.provenance.intent import INTENT_PATH, Intent
from edgekit.bundle.provenance.reliability import LabelledSamples, Reliability, Unmeasured, measure_reliability
from edgekit.bundle.provenance.slsa import provenance_path, state_provenance
from edgekit.bundle.sampling import OpenedModel
from edgekit.bundle.writer import Draft, SessionOpener


def attach_evidence(
    draft: Draft,
    *,
    intent: Intent | None = None,
    data: LabelledSamples | None = None,
    open_session: SessionOpener | None = None,
) -> Draft:
    """The draft with its evidence; evidence that it had is replaced.

    Args:
        draft: all variants in it; not sealed, or the calibration of probabilities cannot be measured.
        intent: the owner's words.
        data: labelled samples, to measure the calibration of probabilities on.
        open_session: the runtime, for the same.
    """
    draft = without_evidence(draft)
    facts = ReleaseFacts(
        manifest=draft.manifest,
        variants=gather_variants(draft.manifest, reader_of(draft)),
        intent=intent or Intent(),
        reliability=_measure(draft, data, open_session),
        data_source=data.source if data is not None else "",
        data_digest=data.digest if data is not None else "",
    )
    for index, each in enumerate(facts.variants):
        draft = draft.with_blob(provenance_path(index), "provenance", state_provenance(facts, each))
    statements = [ref for ref in draft.manifest.blobs if ref.role == "provenance"]
    draft = draft.with_blob(BOM_PATH, "bom", write_bom(facts, statements))
    card = compose_card(facts, [ref for ref in draft.manifest.blobs if ref.role in {"bom", "provenance"}])
    if facts.intent != Intent():
        draft = draft.with_blob(INTENT_PATH, "card", msgspec.json.encode(facts.intent))
    draft = draft.with_blob(MARKDOWN_PATH, "card", render_markdown(card))
    return draft.with_blob(HTML_PATH, "card", render_html(card))


def without_evidence(draft: Draft) -> Draft:
    """The draft without provenance, bill, card and model signature: for who changes what they speak of."""
    dropped = {ref.digest for ref in draft.manifest.blobs if ref.role in EVIDENCE_ROLES}
    kept = tuple(ref for ref in draft.manifest.blobs if ref.digest not in dropped)
    blobs = {digest: content for digest, content in draft.blobs.items() if digest not in dropped}
    return Draft(msgspec.structs.replace(draft.manifest, blobs=kept), blobs)


def _measure(draft: Draft, data: LabelledSamples | None, open_session: SessionOpener | None) -> Reliability | Unmeasured:
    variant = draft.manifest.variants[0]
    if any(ref.digest == variant.model and ref.sealed for ref in draft.manifest.blobs):
        return Unmeasured("the model is sealed")
    if open_session is None:
        return Unmeasured("no runtime was at hand when the release was packed")
    content = draft.blobs[variant.model]
    opener = open_session
    with tempfile.TemporaryDirectory(prefix="edgekit-evidence-") as folder:
        path = content if isinstance(content, Path) else Path(folder) / f"model.{variant.format}"
        if isinstance(content, bytes):
            path.write_bytes(content)

        def open_model(*, threads: int, is_optimized: bool) -> OpenedModel:
            return opener(path, threads=threads, is_optimized=is_optimized)

        return measure_reliability(open_model, draft.manifest.contract, data)
