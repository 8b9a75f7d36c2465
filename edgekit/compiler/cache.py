"""Finished steps of a run, kept by content, so that an interrupted run goes on where it stopped.

The key is the SHA-256 of everything that decides a step's result: the input model's bytes, the pass with its settings, the
calibration data, what the pass reads of the target, the seed, the effort and the versions of the packages. Runs for several
targets share one folder: what is the same for two of them is made once. A step counts when its record is there, which is
written last, and when the model still has the record's digest.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from edgekit import __version__
from edgekit.compiler.passes.base import Pass, PassContext, WorkModel
from edgekit.durable import write_durably
from edgekit.errors import ArtifactError
from edgekit.schema.artifact import ModelFormat
from edgekit.schema.base import Record, decode_json, encode_json
from edgekit.schema.candidate import PassStep
from edgekit.schema.digest import Digest, digest_file
from edgekit.schema.measurement import EvalReport

logger = logging.getLogger(__name__)
PACKAGES = (
    *("numpy", "scipy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "torch", "torch-pruning", "neural-compressor"),
    *("litert-torch", "ai-edge-quantizer", "ai-edge-litert"),
)  # fmt: skip
STEP_RECORD = "step.json"


class StepRecord(Record, frozen=True, kw_only=True):
    """A finished step: the model file beside it, and the lineage up to it."""

    path: str
    digest: Digest
    format: ModelFormat
    precision: str
    lineage: tuple[PassStep, ...]
    has_module: bool


def installed_versions() -> dict[str, str]:
    """Version of every package that can change a result; those that are not installed are left out."""
    found = {"edgekit": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def key_of(*parts: Any) -> str:
    """64 hex digits over the canonical JSON of the parts."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


class StepCache:
    """Steps and evaluations below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._versions = installed_versions()

    def step_key(self, step: Pass, model: WorkModel, context: PassContext, *, source: str, target: str) -> str:
        """The key of a pass on a model; ``source`` is a digest, ``target`` that of what the pass reads of the target."""
        task = getattr(context.task, "data_digest", None)
        shapes = [list(example.shape) for example in context.example_inputs]
        inputs = [source, *(part.output for part in model.lineage)]
        settings = {name: value for name, value in vars(step).items() if not name.startswith("_")}
        run = [context.calibration.digest, target, context.seed, context.effort, task, shapes]
        return key_of(inputs, step.name, settings, run, self._versions)

    def step_dir(self, key: str) -> Path:
        """Where the step works."""
        return self.folder / "steps" / key

    def find_step(self, key: str, model: WorkModel) -> WorkModel | None:
        """The finished step's model, or None."""
        folder = self.step_dir(key)
        try:
            record = decode_json((folder / STEP_RECORD).read_bytes(), StepRecord, name=STEP_RECORD)
            path = folder / record.path
            if digest_file(path) != record.digest:
                return None
        except (OSError, ArtifactError):
            return None
        logger.debug("step found key=%s", key)
        return WorkModel(
            path=path,
            format=record.format,
            precision=record.precision,
            lineage=record.lineage,
            module=model.module if record.has_module else None,
        )

    def keep_step(self, key: str, result: WorkModel, model: WorkModel) -> None:
        """Keep a finished step; one that made a new torch module is not kept, since the module is not in the file."""
        if result.module is not None and result.module is not model.module:
            return
        folder = self.step_dir(key)
        if result.path.parent != folder:
            return
        record = StepRecord(
            path=result.path.name,
            digest=digest_file(result.path),
            format=result.format,
            precision=result.precision,
            lineage=result.lineage,
            has_module=result.module is not None,
        )
        write_durably(folder / STEP_RECORD, encode_json(record))

    def evaluation_key(self, parts: Sequence[Any]) -> str:
        """The key of an evaluation: digests of model, baseline and data, the metric, the instruction set."""
        return key_of("evaluation", list(parts), self._versions)

    def find_evaluation(self, key: str) -> EvalReport | None:
        """A report that was made before, or None."""
        path = self.folder / "evaluations" / f"{key}.json"
        try:
            return decode_json(path.read_bytes(), EvalReport, name=path.name)
        except (OSError, ArtifactError):
            return None

    def keep_evaluation(self, key: str, report: EvalReport) -> None:
        """Keep a report."""
        write_durably(self.folder / "evaluations" / f"{key}.json", encode_json(report))
