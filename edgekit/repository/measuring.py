"""What a release's model does on this machine: golden samples, quality and speed beside another release's.

Models are run from the repository's blobs: each is hashed through the descriptor that the runtime then loads, so a blob that
was exchanged is noticed. Sealed ones are opened into a private folder for as long as it takes.

    >>> with opened(folder, manifest, variant) as model:  # doctest: +SKIP
    ...     check_golden(model).is_passed
    True
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.benchmark.latency import collect, summarize
from edgekit.benchmark.pinning import allowed_cpus, choose_cpus, pinned
from edgekit.benchmark.request import fit_request, make_request, take_samples
from edgekit.bundle.golden import GoldenResult, run_golden
from edgekit.bundle.layout import blob_name
from edgekit.bundle.opening import find_identities, open_sealed
from edgekit.dataset.data import Array, Dataset
from edgekit.dataset.load import load_dataset
from edgekit.errors import RepositoryError, UsageError
from edgekit.evaluation.evaluate import evaluate, predict
from edgekit.evaluation.metric import resolve_metric
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import Session, SessionOptions
from edgekit.schema.base import decode_msgpack
from edgekit.schema.digest import digest_file
from edgekit.schema.manifest import BlobRef, GoldenSet, Manifest, Variant
from edgekit.schema.measurement import EvalReport, LatencyReport
from edgekit.target.probe import probe_target

Progress = Callable[[str, float], None]
CURRENT, WANTED = "current", "wanted"
_OPTIONS = SessionOptions(threads=1)


def _quiet(_text: str, _done: float) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How to measure: ``choose`` names the variant that this machine runs, ``identity`` opens sealed blobs."""

    choose: Callable[[Manifest], Variant]
    data: str | None = None
    metric: str | None = None
    limit: int | None = None
    seconds: float = 2.0
    min_runs: int = 50
    identity: str = ""
    on_progress: Progress = field(default=_quiet)


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A variant whose files can be loaded: paths of their contents."""

    manifest: Manifest
    variant: Variant
    model: Path
    golden: Path

    def session(self, stack: contextlib.ExitStack) -> Session:
        """Load it, until the stack ends."""
        session = open_session(self.model, format=self.variant.format, options=_OPTIONS)
        stack.callback(session.close)
        return session


@contextlib.contextmanager
def opened(folder: Path, manifest: Manifest, variant: Variant, *, identity: str = "") -> Iterator[OpenedModel]:
    """Open a variant's blobs.

    Raises:
        RepositoryError: ``repository.damaged`` when a blob is missing or not what the manifest lists.
        DeviceError: ``device.sealed_...`` when a blob is sealed and the identity does not open it.
    """
    refs = {ref.digest: ref for ref in manifest.blobs}
    wanted = [refs[variant.model], refs[variant.golden]]
    identities = find_identities(wanted, identity, name=f"{manifest.name}@{manifest.version}")
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekit-promote-")))
        paths = []
        for number, ref in enumerate(wanted):
            path = stack.enter_context(_held(folder / blob_name(ref.digest), ref))
            if identities is not None and ref.sealed is not None:
                content = place / str(number)
                open_sealed(path, content, ref, identities)
                path = content
            paths.append(path)
        yield OpenedModel(manifest=manifest, variant=variant, model=paths[0], golden=paths[1])


@contextlib.contextmanager
def _held(path: Path, ref: BlobRef) -> Iterator[Path]:
    """A blob under a name that stays the same file whatever happens to the folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from error
    try:
        held = Path(f"/proc/self/fd/{descriptor}")
        if digest_file(held) != ref.digest:
            raise _damaged(path, "is not what the manifest lists")
        yield held
    finally:
        os.close(descriptor)


def _damaged(path: Path, why: str) -> RepositoryError:
    return RepositoryError("repository.damaged", f"{path}: {why}.", hint="Publish the bundle again, with --again.")


def check_golden(model: OpenedModel) -> GoldenResult:
    """The golden self-test on this machine; errors as :func:`run_golden` and ``open_session``."""
    golden = decode_msgpack(model.golden.read_bytes(), GoldenSet, name=f"golden samples of {model.variant.name}")
    with contextlib.ExitStack() as stack:
        return run_golden(model.session(stack), golden)


def measure_drop(wanted: OpenedModel, current: OpenedModel, trial: Trial) -> EvalReport:
    """Both models on the same samples, compared in pairs.

    Raises:
        UsageError: ``promotion.no_data`` without data, ``promotion.no_metric`` when no default metric has a drop that a limit
            can be set for.
        DataError, ArtifactError: as ``load_dataset``, ``predict`` and ``evaluate``.
    """
    contract = wanted.manifest.contract
    with contextlib.ExitStack() as stack:
        sessions = [each.session(stack) for each in (wanted, current)]
        data = _load(trial, sessions[0], contract.labels)
        if data is None:
            raise UsageError(
                "promotion.no_data",
                "the gate drop needs samples to compare both releases on.",
                hint="Give --data, or --skip-gate drop with a --reason.",
            )
        metric = resolve_metric(trial.metric, has_labels=data.labels is not None, task=contract.task)
        if trial.metric is None and metric.name == "sqnr_db":
            raise UsageError(
                "promotion.no_metric",
                f"{data.source}: has no labels, so there is no metric whose drop could be limited.",
                hint="Give data with labels, name one with --metric, or --skip-gate drop with a --reason.",
            )
        answers = [predict(session, data, on_progress=trial.on_progress) for session in sessions]
        return evaluate(answers[0], answers[1], data, metric, isa=probe_target().isa, labels=contract.labels)


def measure_latency(wanted: OpenedModel, current: OpenedModel, trial: Trial) -> LatencyReport:
    """The wanted model's latency, interleaved with the current one's, whose second session says how large the noise is.

    Raises:
        DataError: ``benchmark.inputs_differ`` when one request does not fit both.
        ArtifactError: when a model cannot be loaded or run.
    """
    allowed = allowed_cpus()
    cpus = choose_cpus(1, allowed=allowed) if len(allowed) > 1 else ()
    with contextlib.ExitStack() as stack:
        with pinned(cpus):
            sessions = {CURRENT: current.session(stack), WANTED: wanted.session(stack)}
            request = _request(sessions[CURRENT], trial)
            fitted, _ = fit_request(request, sessions[WANTED].inputs, name=wanted.variant.name)
            timings = collect(
                sessions,
                request,
                baseline=CURRENT,
                twin=current.session(stack),
                requests={WANTED: fitted},
                seconds=trial.seconds,
                min_runs=trial.min_runs,
                seed=0,
                on_progress=trial.on_progress,
            )
        # no target was named: the host is what is measured, and it is named with all its CPUs, so not while pinned
        return summarize(timings, sessions, baseline=CURRENT, is_on_target=True, threads=1, seed=0)[WANTED]


def _request(session: Session, trial: Trial) -> Mapping[str, Array]:
    if trial.data is None:
        return make_request(session.inputs)
    return take_samples(load_dataset(trial.data, session.inputs, limit=1).inputs, session.inputs)


def _load(trial: Trial, session: Session, labels: tuple[str, ...]) -> Dataset | None:
    if trial.data is None:
        return None
    return load_dataset(trial.data, session.inputs, limit=trial.limit, class_names=labels)
