"""``edgekit bundle export``, ``import``, ``amend``: a bundle in another form, or with other words for the same weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import format_bytes, note, out
from edgekit.errors import UsageError
from edgekit.schema.digest import short

if TYPE_CHECKING:
    from edgekit.bundle.reader import Bundle
    from edgekit.bundle.writer import Draft


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("export")(export_bundle)
    app.command("import")(import_bundle)
    app.command("amend")(amend)


def export_bundle(
    file: Path = typer.Argument(..., metavar="FILE", help="The bundle."),
    oci: Path = typer.Option(..., "--oci", metavar="DIR", help="Folder for the OCI image layout; new or empty."),
) -> None:
    """Write a bundle as an OCI image layout with ModelPack media types, for registries and their tools."""
    from edgekit.bundle.oci import export_oci

    digest = export_oci(file, oci)
    out(f"{oci}  {digest}")
    note(f"to a registry: skopeo copy oci:{oci} docker://REGISTRY/NAME:TAG")


def import_bundle(
    oci: Path = typer.Option(..., "--oci", metavar="DIR", help="OCI image layout that was exported from a bundle."),
    destination: Path = typer.Option(..., "--out", metavar="FILE", help="The bundle to write."),
) -> None:
    """Make the bundle again, byte for byte, from an OCI image layout. Its signature is checked by "bundle verify"."""
    from edgekit.bundle.oci import import_oci

    bundle = import_oci(oci, destination)
    manifest = bundle.manifest
    size = format_bytes(destination.stat().st_size)
    out(f"{destination}  {size}  {manifest.name}@{manifest.version}  manifest sha256:{short(bundle.manifest_digest)}")
    note(f"not verified: nobody checked who signed this; edgekit bundle verify {destination} --key PUB", "yellow")


def amend(
    file: Path = typer.Argument(..., metavar="OLD", help="The release to amend."),
    version: str = typer.Option(..., "--version", help="The new release's version."),
    key: list[Path] = typer.Option([], "--key", help="The publisher's private key; several sign together."),
    labels: Path | None = typer.Option(None, "--labels", metavar="FILE", help="All class names, one a line."),
    threshold: list[str] = typer.Option(
        [], "--threshold", metavar="LABEL=SCORE", help="Score from which this label counts, 0..1; LABEL= takes it away; repeat."
    ),
    contract: Path | None = typer.Option(None, "--contract", metavar="FILE", help="Other rules for the inputs, as with pack."),
    card: Path | None = typer.Option(None, "--card", metavar="FILE", help="As with pack; the old words stay without it."),
    oms_key: Path | None = typer.Option(None, "--oms-key", metavar="KEY", help="As with pack."),
    destination: Path | None = typer.Option(None, "--out", metavar="FILE", help="Default: NAME-VERSION.edgekit."),
) -> None:
    """Make a new release with other labels, thresholds or input rules: the same weights, which devices do not fetch again."""
    from edgekit.bundle.amend import amend_bundle
    from edgekit.bundle.reader import read_bundle
    from edgekit.bundle.writer import write_bundle
    from edgekit.cli.bundle import source_date
    from edgekit.dataset.contract_file import lay_over, read_contract_file
    from edgekit.durable import make_folder
    from edgekit.trust.signer import load_signer

    if not key:
        raise UsageError("bundle.no_key", "no --key to sign with.", hint="Give the publisher's private key.")
    signers = [load_signer(path) for path in key]
    names, scores = _read_labels(labels) if labels else None, _parse_thresholds(threshold)
    bundle = read_bundle(file)
    rules = lay_over(bundle.manifest.contract, read_contract_file(contract)) if contract else None
    path = destination or Path(f"{bundle.manifest.name}-{version}.edgekit")
    make_folder(path.parent)
    with tempfile.TemporaryDirectory(prefix=".edgekit-amend-", dir=path.parent) as folder:
        draft = amend_bundle(
            bundle,
            version=version,
            folder=Path(folder),
            labels=names,
            thresholds=scores,
            contract=rules,
            created_at=source_date(),
        )
        draft = _evidence(draft, bundle, card, oms_key)
        write_bundle(draft.manifest, draft.blobs, signer=signers, out=path)
    new = read_bundle(path)
    out(f"{path}  {format_bytes(path.stat().st_size)}  manifest sha256:{short(new.manifest_digest)}")
    if new.manifest.contract.labels != bundle.manifest.contract.labels:
        note('other labels: devices take this release when it is published with "repo publish --contract-change"', "yellow")
    note(f"a device that has {bundle.manifest.version} fetches {format_bytes(len(new.manifest_bytes))} of it: the manifest")


def _evidence(draft: Draft, old: Bundle, card: Path | None, oms_key: Path | None) -> Draft:
    """Evidence of the new release, where the old one has some."""
    from edgekit.bundle.provenance.attach import attach_evidence
    from edgekit.bundle.provenance.facts import EVIDENCE_ROLES
    from edgekit.bundle.provenance.intent import intent_of, load_intent
    from edgekit.cli.bundle_evidence import add_signature

    roles = {ref.role for ref in old.manifest.blobs} & EVIDENCE_ROLES
    if "signature" in roles and oms_key is None:
        note("the old release has a model signature, the new one has none; give --oms-key", "yellow")
    if roles or card:
        draft = attach_evidence(draft, intent=load_intent(card) if card else intent_of(old))
    return add_signature(draft, oms_key)


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("amend.labels", f"--labels {path}: cannot be read: {error}.") from error
    return tuple(line.strip() for line in lines if line.strip())


def _parse_thresholds(values: list[str]) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for value in values:
        label, separator, text = value.rpartition("=")
        try:
            scores[label] = float(text) if text else None
        except ValueError:
            separator = ""
        if not separator or not label:
            raise UsageError("amend.threshold", f"--threshold {value}: expected LABEL=SCORE, for example cat=0.8.")
    return scores
