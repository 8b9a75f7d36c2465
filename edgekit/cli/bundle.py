"""``edgekit bundle``: make keys, pack and sign, verify, inspect."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekit.cli import bundle_evidence, bundle_export, bundle_inputs
from edgekit.cli.bundle_baseline import add_baseline, baseline_line
from edgekit.cli.console import format_bytes, note, out, out_json, paint, table, warn
from edgekit.errors import EdgekitError, UsageError
from edgekit.schema.digest import short

if TYPE_CHECKING:
    from edgekit.bundle.reader import Bundle
    from edgekit.bundle.writer import Draft
    from edgekit.dataset.data import Dataset
    from edgekit.runtime.session import Session
    from edgekit.schema.candidate import Candidate
    from edgekit.schema.manifest import GoldenFeatures, Manifest, Parity, Requires
    from edgekit.schema.target import TargetProfile

app = typer.Typer(
    help="Pack, verify and inspect signed bundles.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class KeyScheme(enum.StrEnum):
    """What a key pair is for."""

    ed25519 = "ed25519"
    """Signs bundles."""
    age = "age"
    """Opens sealed bundles, on a device or a group of devices."""
    ecdsa_p256 = "ecdsa-p256"
    """Signs models for tools that know OpenSSF Model Signing."""


@app.command()
def keygen(
    destination: Path = typer.Option(
        ..., "--out", metavar="NAME", help="Writes NAME.pem (private, 0600) and NAME.pub; of age NAME.age and NAME.age.pub."
    ),
    scheme: KeyScheme = typer.Option(
        KeyScheme.ed25519, "--scheme", help="ed25519 signs bundles; age opens sealed ones; ecdsa-p256 signs models (--oms-key)."
    ),
) -> None:
    """Make a key pair. EDGEKIT_KEY_PASSPHRASE encrypts a signing key."""
    match scheme:
        case KeyScheme.ed25519:
            _make_signer(destination)
        case KeyScheme.age:
            _make_identity(destination)
        case KeyScheme.ecdsa_p256:
            bundle_evidence.make_producer_pair(destination)


def _make_identity(destination: Path) -> None:
    from edgekit.bundle.sealing import make_identity

    base = destination.with_suffix("") if destination.suffix == ".age" else destination
    private, public = base.with_name(base.name + ".age"), base.with_name(base.name + ".age.pub")
    if public.exists():
        raise UsageError("key.exists", f"{public}: exists already and is not replaced.", hint="Give another name.")
    out(make_identity(private, public))
    note(f"{private}: identity, for the device's age_identity; {public}: recipient, for pack --recipient @{public}")


def _make_signer(destination: Path) -> None:
    from edgekit.trust.keys import save_public_key
    from edgekit.trust.signer import generate_signer, save_signer

    base = destination.with_suffix("") if destination.suffix in {".pem", ".pub"} else destination
    private, public = base.with_name(base.name + ".pem"), base.with_name(base.name + ".pub")
    if public.exists():
        raise UsageError("key.exists", f"{public}: exists already and is not replaced.", hint="Give another name.")
    signer = generate_signer()
    save_signer(signer, private)
    save_public_key(signer.public_key, public)
    out(signer.keyid)
    note(f"{private}: private key, keep it; {public}: public key, give it to who verifies")


@app.command()
def pack(
    folder: list[Path] = typer.Argument(..., metavar="DIR...", help="Output folders of edgekit optimize: one variant each."),
    name: str = typer.Option(..., "--name", help="The model's name, lower case."),
    version: str = typer.Option(..., "--version", help="The release's version, for example 1.0.0."),
    key: list[Path] = typer.Option([], "--key", help="The publisher's private key; several sign together."),
    data: str = typer.Option(
        "", "--data", metavar="DATA", help="Real samples: golden samples and the drift baseline come from them."
    ),
    golden: int = typer.Option(8, "--golden", min=1, max=64, help="Golden samples to keep."),
    parity: str = typer.Option(
        "", "--parity", metavar="LIMIT", help='How alike variants must answer.  Default: "agreement>=0.95" or "sqnr_db>=20".'
    ),
    with_fp32: bool = typer.Option(False, "--with-fp32", help="Add the float32 candidate for devices that no variant fits."),
    recipient: list[str] = typer.Option(
        [], "--recipient", metavar="AGE|@FILE", help="Seal the model for this age1... key; repeat, or @FILE with one a line."
    ),
    card: Path | None = typer.Option(
        None, "--card", metavar="FILE", help="TOML or Markdown: intended use, owner, licence, limits."
    ),
    oms_key: Path | None = typer.Option(
        None, "--oms-key", metavar="KEY", help="Sign the files for OpenSSF Model Signing, too."
    ),
    contract: Path | None = typer.Option(
        None, "--contract", metavar="FILE", help='What is refused, clipped or filled in: TOML, see "edgekit bundle contract".'
    ),
    features: Path | None = typer.Option(
        None, "--features", metavar="FILE", help="How the inputs are made of raw samples: TOML; golden features prove it."
    ),
    raw: Path | None = typer.Option(None, "--raw", metavar="FILE", help="Raw samples for golden features."),
    destination: Path | None = typer.Option(None, "--out", metavar="FILE", help="Default: NAME-VERSION.edgekit."),
) -> None:
    """Make golden samples, pack the candidate and sign it; several folders become variants of one release.

    A device takes the first variant whose rules (architecture, instructions, runtime, memory) it meets; the most demanding come
    first. That variants answer alike is measured, and signed with them.
    """
    from edgekit.bundle.reader import read_bundle

    if not data:
        warn("no --data: golden inputs are drawn within the contract's ranges; real samples test more")
    path = destination or Path(f"{name}-{version}.edgekit")
    request = PackRequest(
        name=name,
        version=version,
        keys=tuple(key),
        data=data,
        golden=golden,
        parity=parity,
        with_fp32=with_fp32,
        recipients=tuple(recipient),
        card=card,
        oms_key=oms_key,
        contract=contract,
        features=features,
        raw=raw,
    )
    make_bundle(folder, request, path)
    bundle = read_bundle(path)
    out(f"{path}  {format_bytes(path.stat().st_size)}  manifest sha256:{short(bundle.manifest_digest)}")


@dataclass(frozen=True, kw_only=True)
class PackRequest:
    """What ``bundle pack`` was asked for."""

    name: str
    version: str
    keys: tuple[Path, ...]
    data: str = ""
    golden: int = 8
    parity: str = ""
    with_fp32: bool = False
    recipients: tuple[str, ...] = ()
    card: Path | None = None
    oms_key: Path | None = None
    contract: Path | None = None
    features: Path | None = None
    raw: Path | None = None


def make_bundle(
    folders: Sequence[Path],
    request: PackRequest,
    path: Path,
    *,
    add_profile: Callable[[Draft, Dataset | None, Callable[[], Session]], Draft] = add_baseline,
) -> None:
    """Pack candidates into a signed bundle.

    Args:
        folders: output folders of ``optimize``.
        request: what it is to be.
        path: the file to write.
        add_profile: adds the drift baseline, by default of the request's data.

    Raises:
        UsageError: ``bundle.no_key``, and what the parts of a bundle raise.
    """
    from edgekit.bundle.writer import write_bundle
    from edgekit.trust.signer import load_signer

    recipients = _recipients(request.recipients)
    if not request.keys:
        raise UsageError(
            "bundle.no_key", "no --key to sign with.", hint='Make one: "edgekit bundle keygen --out keys/publisher".'
        )
    signers = [load_signer(each) for each in request.keys]
    bundle_evidence.check_inputs(request.card, request.oms_key)
    bundle_inputs.check_options(request.features, request.raw, request.contract)
    variants = _expanded(folders, with_fp32=request.with_fp32)
    draft, samples = _draft(
        variants,
        name=request.name,
        version=request.version,
        data=request.data,
        golden=request.golden,
        parity=request.parity,
    )
    model = draft.blobs[draft.manifest.variants[0].model]
    if isinstance(model, Path):
        draft = add_profile(draft, samples, lambda: _open(model, threads=1, is_optimized=True))
    draft = bundle_inputs.add_inputs(
        draft,
        features=request.features,
        raw=request.raw,
        contract_file=request.contract,
        samples=samples,
        open_session=_open,
    )
    draft = bundle_evidence.add_evidence(draft, card=request.card, data=samples, open_session=_open)
    with _sealed(draft, recipients, path) as sealed:
        ready = bundle_evidence.add_signature(sealed, request.oms_key)
        write_bundle(ready.manifest, ready.blobs, signer=signers, out=path)


@dataclass(frozen=True)
class _Made:
    """One variant to pack: its folder, its candidate and what devices must have."""

    folder: Path
    candidate: Candidate
    profile: TargetProfile | None
    rules: Requires | None


def _expanded(folders: Sequence[Path], *, with_fp32: bool) -> list[_Made]:
    """One for each variant, the most demanding first."""
    from edgekit.bundle.selection import RUNTIME_OF, requires_of, strictness
    from edgekit.bundle.writer import read_candidate
    from edgekit.schema.base import decode_json
    from edgekit.schema.variants import VARIANTS_FILE, VariantList

    found: dict[Path, Requires | None] = {}
    for folder in folders:
        listing = folder / VARIANTS_FILE
        if listing.is_file():
            listed = decode_json(listing.read_bytes(), VariantList, name=str(listing))
            found.update({folder / each.folder: each.requires for each in listed.variants})
        else:
            found.setdefault(folder, None)
    if with_fp32:
        found.update(dict.fromkeys(_fp32_folder(list(found))))
    variants = []
    for path, rules in found.items():
        candidate = read_candidate(path)[0]
        if not candidate.verdict.is_budget_met:
            warn(f"{candidate.name} for {candidate.target} misses its budget: {candidate.verdict.reason}")
        variants.append(_Made(path, candidate, None if rules else _profile_of(candidate), rules))

    def demand(item: _Made) -> int:
        artifact = item.candidate.artifact
        if item.rules is not None or artifact is None:
            return strictness(item.rules) if item.rules else 0
        runtime = RUNTIME_OF[artifact.format]
        return strictness(requires_of(item.profile, precision=artifact.precision, runtime=runtime, runtime_version=""))

    return sorted(variants, key=demand, reverse=True)


def _fp32_folder(folders: Sequence[Path]) -> list[Path]:
    for folder in folders:
        for name in ("fp32-optimized", "fp32"):
            if (folder / "candidates" / name / "candidate.json").is_file():
                return [folder / "candidates" / name]
    raise UsageError(
        "bundle.no_fp32",
        "--with-fp32: no float32 candidate among the folders.",
        hint="Keep DIR/candidates of edgekit optimize.",
    )


def _draft(
    variants: Sequence[_Made], *, name: str, version: str, data: str, golden: int, parity: str
) -> tuple[Draft, Dataset | None]:
    """The release with all its variants, not signed yet, and the samples."""
    from edgekit.bundle.writer import add_variant, draft_bundle

    first, *others = variants
    samples = _load_samples(first.candidate, data) if data else None
    draft = draft_bundle(
        first.folder,
        name=name,
        version=version,
        open_session=_open,
        data=samples,
        golden_samples=golden,
        profile=first.profile,
        rules=first.rules,
        created_at=source_date(),
    )
    for other in others:
        draft = add_variant(
            draft,
            other.folder,
            open_session=_open,
            data=samples,
            golden_samples=golden,
            profile=other.profile,
            rules=other.rules,
            limit=parity,
            data_digest=samples.digest if samples is not None else None,
        )
        found = draft.manifest.variants[-1]
        if found.parity is not None:
            note(f"{found.name}: {_parity(found.parity)}", "dim")
    return draft, samples


def _parity(parity: Parity) -> str:
    agreement = f"agreement {parity.agreement:.4f}, " if parity.agreement is not None else ""
    kind = "samples" if parity.data else "drawn inputs, no data was given"
    return f"{agreement}{parity.sqnr_db:.1f} dB against {parity.reference} on {parity.samples} {kind} ({parity.limit})"


def _recipients(values: Sequence[str]) -> tuple[str, ...]:
    """Who can open the release; empty when it is not sealed."""
    from edgekit.bundle.sealing import check_recipients, read_recipients

    return check_recipients(read_recipients(values)) if values else ()


@contextmanager
def _sealed(draft: Draft, recipients: tuple[str, ...], destination: Path) -> Iterator[Draft]:
    """The draft, sealed where there are recipients; the sealed files lie beside the bundle until it is written."""
    import tempfile

    from edgekit.bundle.sealing import seal_models
    from edgekit.durable import make_folder

    if not recipients:
        yield draft
        return
    make_folder(destination.parent)
    with tempfile.TemporaryDirectory(prefix=".edgekit-seal-", dir=destination.parent) as folder:
        yield seal_models(draft, recipients, folder=Path(folder))


def _open(path: Path, *, threads: int, is_optimized: bool) -> Session:
    from edgekit.runtime.registry import open_session
    from edgekit.runtime.session import SessionOptions

    return open_session(path, options=SessionOptions(threads=threads, is_optimized=is_optimized))


def _load_samples(candidate: Candidate, spec: str) -> Dataset:
    from edgekit.dataset.load import load_dataset

    return load_dataset(spec, candidate.artifact.inputs if candidate.artifact else ())


def _profile_of(candidate: Candidate) -> TargetProfile | None:
    """The target's profile; nothing is required of devices where it is not on this machine."""
    from edgekit.target.load import load_target

    try:
        return load_target(candidate.target)
    except EdgekitError:
        warn(f"target {candidate.target}: no such profile here, so the bundle does not require an architecture")
        return None


def source_date() -> datetime | None:
    """SOURCE_DATE_EPOCH, for bytes that can be made again."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(text), UTC) if text.isascii() and text.isdigit() else None


@app.command()
def verify(
    file: Path = typer.Argument(..., metavar="FILE", help="The bundle; or a folder of its files, with --oms-key."),
    key: list[Path] = typer.Option([], "--key", metavar="PUB", help="A publisher's public key that you trust."),
    oms_key: Path | None = typer.Option(
        None, "--oms-key", metavar="PUB", help="The producer's public key, for the model signature."
    ),
) -> None:
    """Check structure, digests, signature and evidence. Exit 4: refused."""
    from edgekit.bundle.reader import verify_bundle
    from edgekit.trust.keys import load_public_key

    if file.is_dir():
        bundle_evidence.verify_unpacked(file, oms_key)
        return
    bundle = verify_bundle(file, [load_public_key(path) for path in key])
    keyids = ", ".join(f"{keyid[:12]}…" for keyid in bundle.keyids)
    evidence = bundle_evidence.verify_evidence(bundle, oms_key)
    out(f"{file.name}: {bundle.manifest.name}@{bundle.manifest.version} is intact, signed by {keyids}")
    for line in evidence:
        out(line)


@app.command()
def inspect(
    file: Path = typer.Argument(..., metavar="FILE", help="The bundle."),
    key: list[Path] = typer.Option([], "--key", metavar="PUB", help="Check the signature with this public key, too."),
    json: bool = typer.Option(False, "--json", help="Print the manifest as JSON."),
) -> None:
    """Show what a bundle holds and how it was made."""
    from edgekit.bundle.reader import read_bundle, verify_bundle
    from edgekit.trust.keys import load_public_key

    bundle = verify_bundle(file, [load_public_key(path) for path in key]) if key else read_bundle(file)
    if not key:
        note("not verified: nobody checked who signed this; give --key PUB", "yellow")
    if json:
        out_json(bundle.manifest)
        return
    _show(bundle)


def _show(bundle: Bundle) -> None:
    from edgekit.schema.base import decode_msgpack
    from edgekit.schema.manifest import GoldenSet

    manifest = bundle.manifest
    state = paint("verified", "green") if bundle.is_verified else paint("not verified", "yellow")
    lines = [
        ("release", f"{manifest.name}@{manifest.version}, {manifest.created_at:%Y-%m-%d %H:%M} UTC"),
        ("manifest", f"sha256:{bundle.manifest_digest.removeprefix('sha256:')}"),
        ("signed by", f"{', '.join(bundle.keyids)} ({state})"),
        ("target", manifest.target),
        *_quality(manifest.candidate),
        *_contract(manifest),
    ]
    sealed = {ref.digest: ref.sealed for ref in manifest.blobs if ref.sealed is not None}
    made: list[GoldenFeatures | None] = []
    for variant in manifest.variants:
        needs = variant.requires
        any_of = [" or ".join(needs.isa_any)] if needs.isa_any else []
        memory = [f"{needs.ram_mb:g} MB"] if needs.ram_mb else []
        rest = " ".join([*needs.arch, *needs.isa, *any_of, *memory])
        lines.append(("variant", f"{variant.name}: {variant.format} {variant.precision}, needs {needs.runtime} "
                                 f">= {needs.runtime_version or 'any'} {rest}".rstrip()))  # fmt: skip
        if variant.parity is not None:
            lines.append(("parity", _parity(variant.parity)))
        if variant.golden in sealed:
            continue
        golden = decode_msgpack(bundle.blob(variant.golden), GoldenSet, name="golden samples")
        lines.append(("golden", f"{len(golden.samples)} samples; {golden.tolerance_reason}"))
        made.append(golden.features)
    lines += bundle_inputs.feature_lines(manifest.features, made)
    lines += baseline_line(bundle)
    if sealed:
        names = dict.fromkeys(name for how in sealed.values() for name in how.recipients)
        lines.append(("sealed", f"model and golden samples, with age, for {', '.join(names)}"))
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        out(f"{paint(label.ljust(width), 'bold')}  {text}")
    out()
    rows = [[ref.path, ref.role, format_bytes(ref.size_bytes), short(ref.digest)] for ref in manifest.blobs]
    out(table(["blob", "role", "size", "sha256"], rows, right=[2]))
    bundle_evidence.show_evidence(bundle)


def _quality(candidate: Candidate) -> list[tuple[str, str]]:
    lines = [("candidate", f"{candidate.name}: {candidate.verdict.status}, {candidate.verdict.reason}")]
    if evaluation := candidate.evaluation:
        text = f"{evaluation.metric} {evaluation.value:.4f} (fp32 {evaluation.baseline:.4f}, drop {evaluation.drop:+.4f})"
        lines.append(("accuracy", f"{text} on {evaluation.samples} samples"))
    if latency := candidate.latency:
        where = "on the target" if latency.is_on_target else f"not on the target, on {latency.host.cpu}"
        lines.append(("latency", f"p50 {latency.p50_ms:.3f} ms, p99 {latency.p99_ms:.3f} ms, measured {where}"))
    steps = " → ".join(step.name for step in candidate.lineage) or "no pass"
    lines.append(("lineage", f"{candidate.source.spec} (sha256:{short(candidate.source.digest)}) → {steps}"))
    return lines


def _contract(manifest: Manifest) -> list[tuple[str, str]]:
    contract = manifest.contract
    lines = bundle_inputs.contract_lines(contract)
    lines += [("output", f"{spec.name}: {spec.dtype}{list(spec.shape)}") for spec in contract.outputs]
    if contract.labels:
        lines.append(("labels", ", ".join(contract.labels)))
    if contract.thresholds:
        lines.append(("thresholds", ", ".join(f"{label} {score:g}" for label, score in contract.thresholds.items())))
    return lines


bundle_evidence.register(app)
bundle_export.register(app)
bundle_inputs.register(app)
