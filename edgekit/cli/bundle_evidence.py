"""``edgekit bundle``: the evidence that travels with a release. Used by the commands of :mod:`edgekit.cli.bundle`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import format_bytes, note, out, paint
from edgekit.errors import UsageError
from edgekit.schema.digest import short

if TYPE_CHECKING:
    from edgekit.bundle.provenance.check import Evidence
    from edgekit.bundle.provenance.reliability import LabelledSamples
    from edgekit.bundle.reader import Bundle
    from edgekit.bundle.writer import Draft, SessionOpener


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(unpack)


def make_producer_pair(destination: Path) -> None:
    """``keygen --scheme ecdsa-p256``."""
    from edgekit.bundle.provenance.producer_key import make_producer_key

    base = destination.with_suffix("") if destination.suffix in {".pem", ".pub"} else destination
    private, public = base.with_name(base.name + ".pem"), base.with_name(base.name + ".pub")
    out(make_producer_key(private, public))
    note(f"{private}: private key, for pack --oms-key; {public}: public key, for verify --oms-key and for model_signing")


def check_inputs(card: Path | None, oms_key: Path | None) -> None:
    """Refuse files that cannot be used before the work begins."""
    from edgekit.bundle.provenance.intent import load_intent
    from edgekit.bundle.provenance.producer_key import load_producer_key

    if card is not None:
        load_intent(card)
    if oms_key is not None:
        load_producer_key(oms_key)


def add_evidence(draft: Draft, *, card: Path | None, data: LabelledSamples | None, open_session: SessionOpener) -> Draft:
    """The draft with provenance, bill of materials and model card."""
    from edgekit.bundle.provenance.attach import attach_evidence
    from edgekit.bundle.provenance.intent import load_intent

    if card is None:
        note('no --card: the model card says "not stated" for intended use, owner and licence', "yellow")
    return attach_evidence(draft, intent=load_intent(card) if card else None, data=data, open_session=open_session)


def add_signature(draft: Draft, oms_key: Path | None) -> Draft:
    """The draft with its model signature, where there is a key."""
    from edgekit.bundle.provenance.oms import sign_files
    from edgekit.bundle.provenance.producer_key import load_producer_key

    return draft if oms_key is None else sign_files(draft, load_producer_key(oms_key))


def verify_evidence(bundle: Bundle, oms_key: Path | None) -> list[str]:
    """Check the evidence; lines that say what there is."""
    from edgekit.bundle.provenance.check import check_evidence
    from edgekit.bundle.provenance.producer_key import load_producer_public_key

    evidence = check_evidence(bundle, load_producer_public_key(oms_key) if oms_key else None)
    return [f"  {label}: {text}" for label, text in describe(evidence)]


def verify_unpacked(folder: Path, oms_key: Path | None) -> None:
    """``verify DIR``: an unpacked folder, by its model signature."""
    from edgekit.bundle.provenance.oms import verify_folder
    from edgekit.bundle.provenance.producer_key import load_producer_public_key

    if oms_key is None:
        text = f"{folder}: a folder is verified by its model signature."
        raise UsageError("oms.no_key", text, hint="Give --oms-key PUB, the producer's public key.")
    key = load_producer_public_key(oms_key)
    found = verify_folder(folder, key)
    out(f"{folder}: {len(found.files)} files of {found.name} are as they were signed by {key.keyid[:12]}…")


def show_evidence(bundle: Bundle) -> None:
    """The section "evidence" of ``inspect``."""
    from edgekit.bundle.provenance.check import check_evidence

    rows = describe(check_evidence(bundle))
    width = max(len(label) for label, _ in rows)
    out()
    out(paint("evidence", "bold"))
    for label, text in rows:
        out(f"  {paint(label.ljust(width), 'bold')}  {text}")


def describe(evidence: Evidence) -> list[tuple[str, str]]:
    """What evidence there is, for people: a label and a text each."""
    if evidence.is_empty:
        return [("evidence", "none in this bundle (no bill of materials, provenance, card or model signature)")]
    rows = []
    for item in evidence.provenance:
        made = " → ".join(item.passes) or "no pass"
        rows.append(
            ("provenance", f"{item.subject} from {item.source} (sha256:{short(item.source_digest)}) by {made}; {item.builder}")
        )
    for bom in evidence.boms:
        models = f"{bom.models} model" + ("s" if bom.models > 1 else "")
        tools = ", ".join(bom.tools) or "none named"
        rows.append(
            ("bill of materials", f"CycloneDX {bom.spec_version}, {bom.components} components, {models}; tools: {tools}")
        )
    if evidence.cards:
        rows.append(("model card", ", ".join(evidence.cards)))
    if evidence.signature is None:
        rows.append(("model signature", "none"))
    else:
        state = "verified" if evidence.is_signature_verified else "not verified: give --oms-key PUB to verify"
        text = f"OMS v1.0 by {evidence.signature.keyid[:12]}… over {len(evidence.signature.files)} files ({state})"
        rows.append(("model signature", text))
    return rows


def unpack(
    file: Path = typer.Argument(..., metavar="FILE", help="The bundle."),
    folder: Path = typer.Argument(..., metavar="DIR", help="A folder that does not exist yet."),
    key: list[Path] = typer.Option([], "--key", metavar="PUB", help="Check the publisher's signature first."),
) -> None:
    """Write the bundle's files into a new folder, for other tools. Sealed files stay sealed."""
    from edgekit.bundle.provenance.unpack import unpack_bundle
    from edgekit.bundle.reader import read_bundle, verify_bundle
    from edgekit.trust.keys import load_public_key

    bundle = verify_bundle(file, [load_public_key(path) for path in key]) if key else read_bundle(file)
    if not key:
        note("not verified: nobody checked who signed this; give --key PUB", "yellow")
    refs = unpack_bundle(bundle, folder)
    out(f"{folder}: {len(refs)} files, {format_bytes(sum(ref.size_bytes for ref in refs))}")
    if sealed := sum(ref.sealed is not None for ref in refs):
        note(f"{sealed} of them are sealed: only their recipients can open them")
