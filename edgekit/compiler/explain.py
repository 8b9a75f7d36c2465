"""How a candidate came to be, and the same thing once more: every step of a lineage run again, its bytes compared.

A lineage holds the pass, its settings, the versions of the packages and the digest of what came out. Run again on the same
model and data with the same versions it must give the same digest; where it does not, the first step that differs is named,
together with the versions that differ.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

from edgekit.compiler.cache import StepCache
from edgekit.compiler.passes.base import Effort, Pass, PassContext, WorkModel
from edgekit.compiler.passes.registry import ROOT, all_passes
from edgekit.compiler.preparation import OptimizeRequest, import_source
from edgekit.compiler.result import OptimizeResult
from edgekit.compiler.source import load_source
from edgekit.dataset.load import load_dataset
from edgekit.errors import ArtifactError, DataError, UsageError
from edgekit.runtime.registry import open_session
from edgekit.runtime.session import SessionOptions
from edgekit.schema.base import Record, decode_json
from edgekit.schema.candidate import Candidate, PassStep
from edgekit.schema.digest import digest_file

REPORT = "report.json"


class StepCheck(Record, frozen=True, kw_only=True):
    """One step run again: the digests of the record and of now, and packages whose version changed (then and now)."""

    name: str
    expected: str
    found: str | None
    changed_versions: dict[str, tuple[str, str]] = {}  # noqa: RUF012  msgspec copies an empty default per instance
    reason: str = ""

    @property
    def is_same(self) -> bool:
        """Whether the bytes are the same."""
        return self.found == self.expected


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A candidate of a finished run with the run around it."""

    result: OptimizeResult
    candidate: Candidate


def read_explanation(folder: Path, name: str | None = None) -> Explanation:
    """The candidate of this name, or the chosen one, of an output folder of ``edgekit optimize``.

    Raises:
        ArtifactError: ``report.unreadable`` when the folder holds no report.
        UsageError: ``candidate.unknown``.
    """
    path = folder / REPORT
    if not path.is_file():
        raise ArtifactError(
            "report.unreadable", f"{folder}: no {REPORT} in it.", hint="Give an output folder of edgekit optimize."
        )
    result = decode_json(path.read_bytes(), OptimizeResult, name=str(path))
    if name is None:
        return Explanation(result=result, candidate=result.chosen)
    found = next((item for item in result.candidates if item.name == name), None)
    if found is None:
        known = ", ".join(item.name for item in result.candidates)
        raise UsageError("candidate.unknown", f"{name}: no candidate of this name in {folder}.", hint=f"Choose from {known}.")
    return Explanation(result=result, candidate=found)


def run_again(explanation: Explanation, on_step: Callable[[str], None] = lambda _name: None) -> tuple[StepCheck, ...]:
    """Run every step of the lineage again in an empty folder.

    The model and the data are read from where the request says they are, relative to the present folder.

    Raises:
        DataError: ``explain.data_changed`` when the calibration data is not the data of the run.
        ArtifactError: ``explain.source_changed`` when the model is not the model of the run.
    """
    request = explanation.result.request
    candidate = explanation.candidate
    source = load_source(
        request.model,
        weights=Path(request.weights) if request.weights else None,
        input_shapes={},
        data=request.data,
        seed=request.seed,
    )
    if source.model.digest != candidate.source.digest:
        raise ArtifactError(
            "explain.source_changed",
            f"{request.model}: its digest is {source.model.digest}, the run's was {candidate.source.digest}.",
            hint="Put the model of that run there.",
        )
    with tempfile.TemporaryDirectory(prefix="edgekit-explain-") as folder:
        cache = StepCache(Path(folder))
        asked = OptimizeRequest(
            model=request.model,
            target=request.target,
            data=request.data,
            effort=cast("Effort", request.effort),
            seed=request.seed,
        )
        model, context = import_source(asked, explanation.result.target, source, cache)
        session = open_session(model.path, options=SessionOptions(threads=1))
        try:
            data = load_dataset(request.data, session.inputs)
        finally:
            session.close()
        expected = next(item.digest for item in explanation.result.data if item.role == "calibration")
        if data.digest != expected:
            raise DataError(
                "explain.data_changed",
                f"{request.data}: its digest is {data.digest}, the run's was {expected}.",
                hint="Put it back.",
            )
        checks = [_check(candidate.lineage[0], model)]
        context = replace(context, calibration=data)
        for index, step in enumerate(candidate.lineage[1:], 1):
            on_step(step.name)
            made, check = _repeat(step, model, replace(context, work_dir=Path(folder) / f"again-{index}"))
            checks.append(check)
            if made is None:
                break
            model = made
    return tuple(checks)


def _repeat(step: PassStep, model: WorkModel, context: PassContext) -> tuple[WorkModel | None, StepCheck]:
    where = next((spec.where for spec in all_passes() if spec.name == step.name), None)
    if where is None:
        return None, StepCheck(name=step.name, expected=step.output, found=None, reason="this version has no such pass")
    context.work_dir.mkdir(parents=True)
    try:
        made = _make(where, step).run(model, context)
    except Exception as error:  # noqa: BLE001  whatever a pass raises, the answer is that the step cannot be repeated
        return None, StepCheck(name=step.name, expected=step.output, found=None, reason=f"{type(error).__name__}: {error}")
    return made, _check(step, made)


def _make(where: str, step: PassStep) -> Pass:
    """The pass with those of its recorded settings that its constructor takes."""
    module, _, attribute = where.rpartition(":")
    kind = getattr(importlib.import_module(f"{ROOT}.{module}"), attribute)
    accepted = getattr(kind.__init__, "__kwdefaults__", None) or {}
    names = {*accepted, *getattr(kind.__init__, "__annotations__", {})} - {"return"}
    renamed = {"kept_fp32": "kept"}
    settings = {renamed.get(name, name): value for name, value in step.settings.items()}
    made: Pass = kind(**{name: value for name, value in settings.items() if name in names})
    return made


def _check(step: PassStep, made: WorkModel) -> StepCheck:
    changed = {}
    for package, before in step.versions.items():
        try:
            now = version(package)
        except PackageNotFoundError:
            now = "not installed"
        if now != before:
            changed[package] = (before, now)
    return StepCheck(name=step.name, expected=step.output, found=digest_file(made.path), changed_versions=changed)
