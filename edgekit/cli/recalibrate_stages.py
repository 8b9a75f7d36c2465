"""The stages of ``edgekit recalibrate``, each a function of what lies in the job folder before it.

samples → check → data → train → compile → evaluate → (gate) → pack → publish → rollout. The verdict rests on samples that no
stage before it has learned from; golden samples of the new release come from the old evaluation data, never from the field.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgekit.cli.bundle_baseline import BASELINE_PATH, profile_of
from edgekit.cli.console import Progress, note, warn
from edgekit.cli.recalibrate_data import load_field, measure_shift, save_dataset, save_field, specs_of
from edgekit.cli.recalibrate_fleet import begin_rollout, read_samples
from edgekit.cli.recalibrate_job import Job
from edgekit.dataset.data import Dataset
from edgekit.dataset.field import (
    FieldCheck,
    FieldData,
    assemble,
    check_field,
    join_data,
    mix,
    split_holdout,
    with_labels,
)
from edgekit.dataset.load import load_dataset
from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.errors import EdgekitError, UsageError
from edgekit.evaluation.evaluate import predict
from edgekit.evaluation.metric import Metric, resolve_metric
from edgekit.evaluation.rivals import Rivalry, compare_rivals
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.contract import Contract
from edgekit.schema.digest import digest_bytes, digest_file, short
from edgekit.schema.manifest import Manifest, Variant
from edgekit.schema.recalibration import Answer, Lineage, StageName, StreamShift
from edgekit.schema.release import Release
from edgekit.schema.work import FieldSample

if TYPE_CHECKING:
    from edgekit.bundle.writer import Draft
    from edgekit.runtime.session import Session
    from edgekit.schema.baseline import ReferenceProfile

CHECKS_FILE, SHIFTS_FILE, RIVALS_FILE = "checks.json", "shifts.json", "comparison.json"
CALIBRATION_FILE, DEVELOPMENT_FILE, RETRAINED_FILE = "calibration.npz", "development.npz", "retrained.onnx"
LINEAGE_PATH = "recalibration.json"
OLD, FIELD = "old evaluation data", "field samples"
MIN_FIDELITY_SAMPLES = 100
CLEAR_PSI = 0.1
_STAGES: tuple[StageName, ...] = ("samples", "check", "data", "train", "compile", "evaluate", "pack", "publish", "rollout")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for; see ``edgekit recalibrate --help``."""

    name: str
    model: str
    repository: Path
    data: str
    evaluation: str
    targets: tuple[str, ...]
    out: Path
    keys: tuple[Path, ...] = ()
    fleet: str = ""
    samples: Path | None = None
    train: str = ""
    weights: Path | None = None
    from_channel: str = "production"
    channel: str = "staging"
    version: str = ""
    share: float = 0.5
    min_samples: int = 200
    min_labelled: int = 100
    max_samples: int = 20_000
    margin: float = 0.02
    accept: tuple[Answer, ...] = ("better",)
    metric: str = ""
    budget: str = ""
    effort: str = "default"
    seed: int = 0
    with_redacted: bool = False
    card: Path | None = None
    contract: Path | None = None
    features: Path | None = None
    raw: Path | None = None
    waves: str = "canary:1,10%,50%,100%"
    soak_min: float = 30.0
    gates: tuple[str, ...] = ("error_share<=2%", "latency_p95_ratio<=1.5")
    is_published: bool = True
    is_rolled_out: bool = True
    identity: str = ""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The release that serves."""

    release: Release
    manifest: Manifest
    variant: Variant
    profile: ReferenceProfile | None

    @property
    def what(self) -> str:
        """``name@version``."""
        return f"{self.release.info.name}@{self.release.info.version}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def find_serving(options: Options) -> Serving:
    """The newest release of the channel, and its variant for the first target.

    Raises:
        UsageError: ``recalibrate.nothing_serves``.
        RepositoryError: the repository cannot be read.
    """
    from edgekit.bundle.layout import blob_name
    from edgekit.repository.listing import head_of, releases_of
    from edgekit.repository.publishing import load_manifest
    from edgekit.repository.store import Store
    from edgekit.schema.baseline import ReferenceProfile

    releases = releases_of(Store.open(options.repository).chain())
    release = head_of(releases, options.name, options.from_channel)
    if release is None:
        known = sorted({f"{each.info.name} ({each.info.channel})" for each in releases}) or ["nothing"]
        raise UsageError(
            "recalibrate.nothing_serves",
            f"{options.repository}: no release of {options.name} on {options.from_channel}; there is {', '.join(known)}.",
            hint="Name the model as it was packed, and its channel by --from.",
        )
    manifest, _ = load_manifest(options.repository, release)
    variant = next((each for each in manifest.variants if (each.target or manifest.target) == options.targets[0]), None)
    ref = next((each for each in manifest.blobs if each.role == "baseline" and each.sealed is None), None)
    profile = None
    if ref is not None:
        profile = decode_json((options.repository / blob_name(ref.digest)).read_bytes(), ReferenceProfile, name=BASELINE_PATH)
    return Serving(release=release, manifest=manifest, variant=variant or manifest.variants[0], profile=profile)


@dataclass
class Run:
    """One run over a job: what the stages share."""

    options: Options
    serving: Serving
    job: Job
    progress: Progress
    is_quiet: bool = False
    order_id: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The job's."""
        return self.job.folder

    @property
    def contract(self) -> Contract:
        """Of the release that serves."""
        return self.serving.manifest.contract

    def tell(self, stage: StageName, text: str, done: float = 0.0) -> None:
        """Progress inside a stage, as progress of the whole."""
        place = _STAGES.index(stage)
        self.progress.update(text, (place + min(max(done, 0.0), 1.0)) / len(_STAGES))

    def do(self, stage: StageName, key: Sequence[object], work: Callable[[], str]) -> str:
        """Run a stage, or say that it is done already."""
        is_done = self.job.is_done(stage, key)
        text = self.job.run(stage, key, work, now_ms=_now_ms())
        self.progress.clear()
        if not self.is_quiet:
            note(f"{stage:<9} {text}{' (kept)' if is_done else ''}", *(("dim",) if is_done else ()))
        return text

    @cached_property
    def old(self) -> Dataset:
        """The old calibration data."""
        return load_dataset(self.options.data, specs_of(self.contract), class_names=self.contract.labels)

    @cached_property
    def evaluation(self) -> Dataset:
        """The old evaluation data."""
        return load_dataset(self.options.evaluation, specs_of(self.contract), class_names=self.contract.labels)

    @cached_property
    def found(self) -> FieldData:
        """The field samples."""
        return load_field(self.folder, self.contract)

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """Which field samples are learned from, and which are held out."""
        return split_holdout(self.found, needs_label=self.found.labelled > 0)

    @cached_property
    def has_labels(self) -> bool:
        """Whether enough labels came for a verdict by them."""
        return self.found.labelled >= self.options.min_labelled > 0

    def open_serving(self, stack: contextlib.ExitStack) -> Session:
        """A session of the model that serves, until the stack ends."""
        from edgekit.repository.measuring import opened

        model = stack.enter_context(
            opened(self.options.repository, self.serving.manifest, self.serving.variant, identity=self.options.identity)
        )
        return model.session(stack)


# --- samples, checks, data --------------------------------------------------------------------------------------------------


def take_samples(run: Run) -> str:
    """Pull the samples from the fleet, or read them from a file."""
    options, since = run.options, run.job.record.since_ms
    source = digest_file(options.samples) if options.samples is not None else f"{options.fleet} since {since}"
    key = (source, options.name, options.with_redacted, options.max_samples)

    def work() -> str:
        if options.samples is not None:
            found = _read_file(options.samples, run.contract)
        else:
            pages = read_samples(
                options.fleet,
                options.name,
                since_ms=since,
                limit=options.max_samples,
                on_progress=lambda text, done: run.tell("samples", text, done),
            )
            found = assemble(pages, run.contract, with_redacted=options.with_redacted)
        if not len(found):
            left = ", ".join(f"{count} {why}" for why, count in found.skipped.items())
            raise UsageError(
                "recalibrate.no_samples",
                f"{options.name}: no field sample can be used{f' ({left})' if left else ''}.",
                hint="Devices give samples when their owner says so: [samples] per_day and redact in the agent's "
                "configuration; edgekit fleet shows how many there are.",
            )
        save_field(run.folder, found)
        run.__dict__.pop("found", None)
        return f"{len(found)} distinct field samples, {found.labelled} with a label"

    return run.do("samples", key, work)


def _read_file(path: Path, contract: Contract) -> FieldData:
    """Field samples that somebody brings in a file; a label below 0 means that there is none."""
    data = load_dataset(str(path), specs_of(contract), class_names=contract.labels)
    labels = data.labels if data.labels is not None and data.labels.dtype.kind == "i" else np.full(len(data), -1)
    samples = (_as_sample(data, place, int(labels[place]), contract) for place in range(len(data)))
    return assemble(samples, contract)


def _as_sample(data: Dataset, place: int, label: int, contract: Contract) -> FieldSample:
    from edgekit.schema.message import SampleTensor

    names = contract.labels
    tensors = tuple(
        SampleTensor(name=name, dtype=array.dtype.name, shape=(1, *array.shape[1:]), data=array[place].tobytes())
        for name, array in data.inputs.items()
    )
    shown = "" if label < 0 else names[label] if label < len(names) else str(label)
    return FieldSample(
        site="file", device=Path(data.source).name, time_ms=0, model_digest="", prediction_id=str(place), predicted="",
        confidence=0.0, label=shown, redacted=(), tensors=tensors,
    )  # fmt: skip


def check_samples(run: Run) -> tuple[tuple[FieldCheck, ...], tuple[StreamShift, ...]]:
    """Look at the samples before they are used."""
    options = run.options
    needs_labels = bool(options.train)
    key = (run.found.data.digest, digest_bytes(run.found.labels.tobytes()), options.min_samples, options.min_labelled)

    def work() -> str:
        run.tell("check", "comparing the field with the baseline")
        wanted = options.min_labelled if needs_labels or run.found.labelled else 0
        checks = list(check_field(run.found, min_samples=options.min_samples, min_labelled=wanted, contract=run.contract))
        shifts: tuple[StreamShift, ...] = ()
        if run.serving.profile is not None:
            with contextlib.ExitStack() as stack:
                shifts = measure_shift(run.serving.profile, run.found.data, run.open_serving(stack))
        checks.append(_judge_shift(shifts))
        write_durably(run.folder / CHECKS_FILE, encode_json(tuple(checks)), mode=PRIVATE_FILE)
        write_durably(run.folder / SHIFTS_FILE, encode_json(shifts), mode=PRIVATE_FILE)
        refused = [each.name for each in checks if each.verdict == "refused"]
        return f"refused: {', '.join(refused)}" if refused else f"{len(checks)} checks passed; {checks[-1].text}"

    run.do("check", (*key, needs_labels, run.serving.release.manifest_digest), work)
    return read_checks(run.folder)


def read_checks(folder: Path) -> tuple[tuple[FieldCheck, ...], tuple[StreamShift, ...]]:
    """What :func:`check_samples` wrote."""
    checks = msgspec.json.decode((folder / CHECKS_FILE).read_bytes(), type=tuple[FieldCheck, ...])
    return checks, msgspec.json.decode((folder / SHIFTS_FILE).read_bytes(), type=tuple[StreamShift, ...])


def _judge_shift(shifts: tuple[StreamShift, ...]) -> FieldCheck:
    if not shifts:
        return FieldCheck(name="drift", verdict="warning", text="the release that serves has no baseline to compare with")
    first = shifts[0]
    if first.psi < CLEAR_PSI:
        text = f"the field looks as the baseline does (largest PSI {first.psi:.2f}, {first.name})"
        return FieldCheck(name="drift", verdict="warning", text=text)
    return FieldCheck(name="drift", verdict="ok", text=f"largest PSI {first.psi:.2f} ({first.name})")


def prepare_data(run: Run) -> str:
    """Cut the field samples in two, and mix the calibration data."""
    options = run.options
    key = (run.found.data.digest, digest_bytes(run.found.labels.tobytes()), run.old.digest, run.evaluation.digest,
           options.share, options.seed)  # fmt: skip

    def work() -> str:
        learn, held = run.parts
        if not len(learn):
            raise UsageError("recalibrate.no_samples", "no field sample is left to learn from.", hint="Wait for more.")
        calibration = mix(run.old, run.found.data.select(learn), share=options.share, seed=options.seed)
        save_dataset(run.folder / CALIBRATION_FILE, calibration)
        labelled = with_labels(run.found, learn)
        parts = [run.evaluation, labelled] if len(labelled) and run.evaluation.labels is not None else [run.evaluation]
        save_dataset(run.folder / DEVELOPMENT_FILE, join_data(parts, source="evaluation data with field samples"))
        return f"calibration of {len(calibration)} samples, {options.share:.0%} of the field; {len(held)} held out"

    return run.do("data", key, work)


# --- train, compile ---------------------------------------------------------------------------------------------------------


def train_model(run: Run) -> str:
    """Run the user's training, where there is one."""
    from edgekit.compiler.retrain import Lesson, retrain
    from edgekit.compiler.source import load_source

    options = run.options
    data_note = run.job.find("data")
    key = (options.model, str(options.weights), options.train, options.seed, data_note.key if data_note else "")

    def work() -> str:
        if not options.train:
            return "none: quantized anew only"
        run.tell("train", f"training by {options.train}")
        source = load_source(options.model, weights=options.weights, data=options.data, seed=options.seed)
        lesson = Lesson(
            module=source.module,
            path=source.path,
            old=run.old,
            field=with_labels(run.found, run.parts[0]),
            seed=options.seed,
            on_progress=lambda text, done: run.tell("train", text, done),
        )
        out = retrain(options.train, source, lesson, contract=run.contract, out=run.folder / RETRAINED_FILE)
        return f"{options.train} on {len(lesson.field)} labelled field samples: {short(digest_file(out))}"

    return run.do("train", key, work)


def compile_model(run: Run) -> str:
    """Optimize for every target, by the pipeline of ``edgekit optimize``."""
    from edgekit.compiler.pipeline import optimize
    from edgekit.compiler.preparation import OptimizeRequest

    options = run.options
    trained, data_note = run.job.find("train"), run.job.find("data")
    key = (trained and (trained.key, trained.text), data_note and data_note.key, options.targets, options.effort,
           options.budget, options.metric, options.seed)  # fmt: skip

    def work() -> str:
        made = []
        for number, target in enumerate(options.targets):
            request = OptimizeRequest(
                model=str(run.folder / RETRAINED_FILE) if options.train else options.model,
                target=target,
                data=str(run.folder / CALIBRATION_FILE),
                evaluation=str(run.folder / DEVELOPMENT_FILE),
                metric=options.metric or None,
                budget=options.budget or None,
                out=_candidate_folder(run, target),
                work=run.folder / "candidates",
                effort=options.effort,  # type: ignore[arg-type]
                seed=options.seed,
                weights=None if options.train else options.weights,
                labels=run.contract.labels,
            )

            def tell(event: Any, number: int = number, target: str = target) -> None:
                run.tell("compile", f"{target}: {event.stage}", (number + event.done) / len(options.targets))

            result = optimize(request, tell)
            for text in result.warnings:
                run.notes.append(text)
            made.append(f"{target}: {result.chosen.name}{'' if result.is_budget_met else ' (misses its budget)'}")
        return "; ".join(made)

    return run.do("compile", key, work)


def _candidate_folder(run: Run, target: str) -> Path:
    return run.folder / "candidates" / Path(target).stem


# --- evaluate ---------------------------------------------------------------------------------------------------------------


def evaluate_rivals(run: Run) -> tuple[Rivalry, ...]:
    """The new model beside the one that serves, on the old evaluation data and on what the field gave."""
    compiled, options = run.job.find("compile"), run.options
    key = (compiled and (compiled.key, compiled.text), run.serving.release.manifest_digest, options.margin, options.metric,
           options.min_labelled)  # fmt: skip

    def work() -> str:
        with contextlib.ExitStack() as stack:
            current = run.open_serving(stack)
            candidate = _open_candidate(run, stack)
            rivals = (_on_old(run, candidate, current), _on_field(run, stack, candidate, current))
        write_durably(run.folder / RIVALS_FILE, encode_json(rivals), mode=PRIVATE_FILE)
        return "; ".join(f"{each.name}: {each.verdict}" for each in rivals)

    run.do("evaluate", key, work)
    return read_rivals(run.folder)


def read_rivals(folder: Path) -> tuple[Rivalry, ...]:
    """What :func:`evaluate_rivals` wrote."""
    return msgspec.json.decode((folder / RIVALS_FILE).read_bytes(), type=tuple[Rivalry, ...])


def _open_candidate(run: Run, stack: contextlib.ExitStack) -> Session:
    from edgekit.bundle.writer import read_candidate

    place = _candidate_folder(run, run.options.targets[0])
    artifact = read_candidate(place)[0].artifact
    assert artifact is not None, "optimize writes a model"
    return _opened(place / artifact.path, stack)


def _opened(path: Path, stack: contextlib.ExitStack) -> Session:
    from edgekit.runtime.registry import open_session
    from edgekit.runtime.session import SessionOptions

    session = open_session(path, options=SessionOptions(threads=1))
    stack.callback(session.close)
    return session


def _answers(run: Run, session: Session, data: Dataset, text: str) -> dict[str, Any]:
    return predict(session, data, on_progress=lambda _text, done: run.tell("evaluate", text, done))


def _on_old(run: Run, candidate: Session, current: Session) -> Rivalry:
    data = run.evaluation
    metric = resolve_metric(run.options.metric or None, has_labels=data.labels is not None, task=run.contract.task)
    if metric.name == "sqnr_db":
        raise UsageError(
            "recalibrate.no_metric",
            f"{run.options.evaluation}: without labels nobody can tell whether something was lost on the old data.",
            hint="Give evaluation data with labels, or --metric module:function.",
        )
    return compare_rivals(
        _answers(run, candidate, data, "the new model on the old evaluation data"),
        _answers(run, current, data, "the model that serves on the old evaluation data"),
        data,
        metric,
        name=OLD,
        margin=run.options.margin,
        seed=run.options.seed,
    )


def _on_field(run: Run, stack: contextlib.ExitStack, candidate: Session, current: Session) -> Rivalry:
    """By labels where there are enough; else by how faithful both are to the float model that both were made of."""
    _, held = run.parts
    reference = None
    if run.has_labels:
        data = with_labels(run.found, held)
        metric, least = _labelled_metric(run), max(1, round(run.options.min_labelled * 0.25))
    else:
        data = run.found.data.select(held)
        metric, least = resolve_metric(None, has_labels=False, task=run.contract.task), MIN_FIDELITY_SAMPLES
        reference = _float_answers(run, stack, data)
    if not len(data):
        raise UsageError(
            "recalibrate.no_samples", "no field sample was held out for the verdict.", hint="Wait for more samples."
        )
    return compare_rivals(
        _answers(run, candidate, data, "the new model on field samples"),
        _answers(run, current, data, "the model that serves on field samples"),
        data,
        metric,
        name=FIELD,
        margin=run.options.margin,
        min_samples=least,
        reference=reference,
        seed=run.options.seed,
    )


def _labelled_metric(run: Run) -> Metric:
    return resolve_metric(run.options.metric or None, has_labels=True, task=run.contract.task)


def _float_answers(run: Run, stack: contextlib.ExitStack, data: Dataset) -> dict[str, Any]:
    """What the float model answers; only where nothing was trained is it the parent of both."""
    folder = _candidate_folder(run, run.options.targets[0])
    for place in (folder / "candidates" / "fp32", folder):
        if (place / "model.onnx").is_file():
            return _answers(run, _opened(place / "model.onnx", stack), data, "the float model on field samples")
    raise UsageError("recalibrate.no_reference", f"{folder}: no float model to compare with.", hint="Wait for labels.")


def decide(rivals: Sequence[Rivalry]) -> Answer:
    """One answer of both comparisons: worse on either is worse, and what cannot be told on either cannot be told."""
    verdicts = [each.verdict for each in rivals]
    for answer in ("worse", "cannot tell"):
        if answer in verdicts:
            return "worse" if answer == "worse" else "cannot tell"
    on_field = next((each.verdict for each in rivals if each.name == FIELD), verdicts[-1])
    return "better" if on_field == "better" else "not worse"


# --- pack, publish, roll out ------------------------------------------------------------------------------------------------


def next_version(version: str, taken: Sequence[str]) -> str:
    """The next free version: its last number plus one.

    >>> next_version("1.0.9", ["1.0.9", "1.0.10"])
    '1.0.11'
    >>> next_version("2026-a", [])
    '2026-a.1'
    """
    head, _, last = version.rpartition(".")
    stem, number = (head, int(last)) if head and last.isdecimal() else (version, 0)
    while True:
        number += 1
        if (found := f"{stem}.{number}") not in taken:
            return found


def choose_version(run: Run) -> str:
    """The version that was asked for, or the next one; one that this job packed already stays."""
    from edgekit.repository.listing import releases_of
    from edgekit.repository.store import Store

    if run.options.version:
        return run.options.version
    if (known := run.job.find("pack")) is not None:
        packed = known.text.split()[0].rpartition("@")[2]
        if run.job.is_done("pack", _pack_key(run, packed)):
            return packed
    releases = releases_of(Store.open(run.options.repository).chain())
    taken = [each.info.version for each in releases if each.info.name == run.options.name]
    return next_version(run.serving.release.info.version, taken)


def _pack_key(run: Run, version: str) -> tuple[object, ...]:
    compiled = run.job.find("compile")
    return (compiled and (compiled.key, compiled.text), version, tuple(map(str, run.options.keys)))


def lineage_of(run: Run) -> Lineage:
    """Where the new release comes from."""
    calibration = load_dataset(str(run.folder / CALIBRATION_FILE), specs_of(run.contract))
    learn, held = run.parts
    training = with_labels(run.found, learn) if run.options.train else None
    return Lineage(
        parent=run.serving.what,
        parent_manifest=run.serving.release.manifest_digest,
        order=run.order_id,
        field_data=run.found.data.digest,
        field_samples=len(run.found),
        labelled=run.found.labelled,
        held_out=len(held),
        calibration_data=calibration.digest,
        old_share=1.0 - run.options.share,
        trained_by=run.options.train,
        training_data=training.digest if training is not None else None,
    )


def pack(run: Run, version: str, rivals: Sequence[Rivalry]) -> Path:
    """Pack and sign the release."""
    from edgekit.cli.bundle import PackRequest, make_bundle

    options = run.options
    path = run.folder / f"{options.name}-{version}.edgekit"
    if not path.is_file():
        run.job.forget("pack")

    def add_profile(draft: Draft, _samples: Dataset | None, open_model: Callable[[], Session]) -> Draft:
        from edgekit.bundle.feature_samples import with_contract

        model = open_model()
        try:
            profile = field_profile(run, draft.manifest.contract, model)
        finally:
            model.close()
        evidence = {"lineage": lineage_of(run), "comparison": [_without_tables(each) for each in rivals]}
        draft = draft.with_blob(BASELINE_PATH, "baseline", encode_json(profile))
        draft = draft.with_blob(LINEAGE_PATH, "report", encode_json(evidence))
        return with_contract(draft, carry_rules(run.contract, draft.manifest.contract))

    def work() -> str:
        run.tell("pack", "packing and signing")
        request = PackRequest(
            name=options.name,
            version=version,
            keys=options.keys,
            data=options.evaluation,
            card=options.card,
            contract=options.contract,
            features=options.features,
            raw=options.raw,
        )
        make_bundle([_candidate_folder(run, target) for target in options.targets], request, path, add_profile=add_profile)
        return f"{options.name}@{version} from {run.serving.what}: {path.name}"

    run.do("pack", _pack_key(run, version), work)
    return path


def _without_tables(rival: Rivalry) -> Rivalry:
    return msgspec.structs.replace(rival, confusion_current=(), confusion_candidate=())


def field_profile(run: Run, contract: Contract, model: Session) -> ReferenceProfile:
    """The new baseline: inputs as the field gave them, answers with how often they were right on what was held out."""
    whole = profile_of(contract, run.found.data, model)
    held = with_labels(run.found, run.parts[1])
    if not len(held):
        return whole
    right = {each.name: each for each in profile_of(contract, held, model).streams if each.kind == "classes"}
    streams = tuple(right.get(each.name, each) for each in whole.streams)
    return msgspec.structs.replace(whole, streams=streams)


def carry_rules(old: Contract, new: Contract) -> Contract:
    """The old contract with the new ranges where a range only counts and refuses nothing."""
    ranges = {each.name: each for each in new.inputs}
    inputs = []
    for spec in old.inputs:
        made = ranges.get(spec.name)
        if made is not None and spec.out_of_range == "pass" and not spec.columns:
            spec = msgspec.structs.replace(spec, minimum=made.minimum, maximum=made.maximum)  # noqa: PLW2901
        inputs.append(spec)
    return msgspec.structs.replace(old, inputs=tuple(inputs))


def publish(run: Run, bundle: Path, version: str) -> str:
    """Publish the release; in a gated repository on its first channel, and promote it from there.

    Raises:
        UsageError: ``recalibrate.not_promoted`` when a gate of the repository says no.
    """
    from edgekit.repository.deltas import make_deltas
    from edgekit.repository.publishing import publish as publish_bundle
    from edgekit.repository.store import Store

    options = run.options
    key = (digest_file(bundle), options.channel)

    def work() -> str:
        run.tell("publish", f"publishing on {options.channel}")
        config = Store.open(options.repository).config
        first = config.channels[0] if config.is_gated else options.channel
        text = f"recalibrated from {run.serving.what}{f', work order {run.order_id}' if run.order_id else ''}"
        release = publish_bundle(options.repository, bundle, channel=first, notes=text, delta_maker=make_deltas)
        for channel in config.channels[1 : config.channels.index(options.channel) + 1] if first != options.channel else ():
            _promote(run, version, channel)
        return f"{options.name}@{version} is on {options.channel}, counter {release.info.counter}"

    return run.do("publish", key, work)


def _promote(run: Run, version: str, channel: str) -> None:
    from edgekit.cli.repo_release import make_trial
    from edgekit.repository.deltas import make_deltas
    from edgekit.repository.promotion import promote

    trial = make_trial(run.options.evaluation, run.options.metric, None, seconds=0.5, identity=run.options.identity,
                       progress=run.progress)  # fmt: skip
    report = promote(run.options.repository, run.options.name, version, to=channel, trial=trial, delta_maker=make_deltas)
    if not report.is_passed:
        failed = ", ".join(f"{each.gate}: {each.reason or each.value}" for each in report.gates if each.verdict == "failed")
        raise UsageError("recalibrate.not_promoted", f"{run.options.name}@{version}: not promoted to {channel}: {failed}.")


def rollout_command(options: Options, version: str) -> str:
    """What a person types to do it by hand."""
    url = options.fleet or "URL"
    gates = " ".join(f'--gate "{gate}"' for gate in options.gates)
    return (
        f"edgekit fleet rollout start {options.name}@{version} --channel {options.channel} "
        f'--waves "{options.waves}" --soak {options.soak_min:g}min {gates} --url {url}'
    )


def roll_out(run: Run, version: str) -> int:
    """Begin a canary rollout through the fleet; 0 where that is not possible, and then the command is named."""
    options = run.options
    command = rollout_command(options, version)
    if not options.is_rolled_out or not options.fleet:
        why = "--no-rollout" if options.fleet else "no --fleet"
        run.progress.clear()
        note(f"rollout   {why}; begin it by: {command}", "yellow")
        return 0
    known = run.job.find("rollout")
    if known is not None and run.job.is_done("rollout", (version, options.channel, options.fleet)):
        note(f"rollout   {known.text} (kept)", "dim")
        return int(known.text.split()[1])
    body = {
        "model": options.name,
        "version": version,
        "channel": options.channel,
        "waves": options.waves,
        "gates": options.gates,
        "soak_min": options.soak_min,
        "reason": f"recalibrated from {run.serving.what}, work order {run.order_id}",
    }
    try:
        number = begin_rollout(options.fleet, body)
    except EdgekitError as error:
        run.progress.clear()
        warn(f"the release is published, but no rollout was begun: {error.message} {error.hint}".rstrip())
        note(f"rollout   begin it by: {command}", "yellow")
        run.notes.append(f"no rollout was begun: {error.message}")
        return 0
    text = f"rollout {number} has begun: {options.waves}"
    run.job.note("rollout", (version, options.channel, options.fleet), text, seconds=0.0, now_ms=_now_ms())
    run.progress.clear()
    note(f"rollout   {text}")
    return number
