"""The pass that makes a smaller student: whole channels pruned, then fine-tuned with its parent as the teacher.

Training takes minutes to hours, so its result is kept by content (``kept.py``) in the task's ``trained_dir`` and taken from
there by the next run; an interrupted training goes on after its last whole epoch. A result that was trained with more effort
than asked for is taken as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.compiler.export import export_onnx
from edgekit.compiler.passes.base import Effort, PassContext, WorkModel
from edgekit.compiler.passes.on_torch.distillation import DistillationSettings, deterministic, train_student
from edgekit.compiler.passes.on_torch.export import find_torch_obstacle, names_of
from edgekit.compiler.passes.on_torch.kept import (
    KeptRecord,
    Recipe,
    digest_state,
    encode_weights,
    find_kept,
    load_kept,
    save_kept,
)
from edgekit.compiler.passes.on_torch.pruning import (
    PruningSettings,
    apply_plan,
    count_macs,
    is_prunable,
    measure_importance,
    plan_pruning,
    widths_of,
)
from edgekit.errors import ArtifactError, DataError, EdgekitError
from edgekit.schema.candidate import PassStep
from edgekit.schema.digest import digest_bytes, digest_file, short

if TYPE_CHECKING:
    from torch import nn

    from edgekit.compiler.task import TrainTask

logger = logging.getLogger(__name__)
EPOCHS: dict[Effort, int] = {"fast": 2, "default": 8, "max": 24}
PACKAGES = ("torch", "torch-pruning", "onnx")


@dataclass(frozen=True, kw_only=True)
class _Student:
    module: nn.Module
    record: KeptRecord
    notes: tuple[str, ...]


class PruneAndDistill:
    """Structured pruning at the target's channel multiple, then distillation from the fp32 parent.

    Args:
        macs_goal: share of the parent's multiply-accumulates to come down to.
        epochs: epochs of fine-tuning by effort.
    """

    name = "prune-and-distill"
    target_fields = ("channel_multiple",)

    def __init__(self, *, macs_goal: float = 0.5, epochs: dict[Effort, int] | None = None) -> None:
        self.macs_goal = macs_goal
        self.epochs = dict(epochs or EPOCHS)

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:
        """Why this pass cannot run on this model, or None when it can."""
        if obstacle := find_torch_obstacle(model, context):
            return obstacle
        if context.task is None:
            return "needs a TrainTask, to fine-tune what pruning breaks"
        recipes = self._recipes(model, context)
        try:
            if any(find_kept(folder, recipe.key) for recipe in recipes for folder in _folders(context)):
                return None
        except ArtifactError:
            return None  # run() says what is wrong with it
        obstacle = _find_pruning_obstacle(model.module, context, recipes[0].pruning)  # type: ignore[arg-type]
        return obstacle or _find_data_obstacle(context.task, context.seed)

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Prune and train, or take the kept result; then export.

        Raises:
            DataError: when nothing is kept and the training data is not there.
            ArtifactError: when nothing can be pruned, or kept weights are damaged.
        """
        started = time.monotonic()
        recipes = self._recipes(model, context)
        student = self._find_student(model, context, recipes) or self._make_student(model, context, recipes[0])
        context.on_progress("exporting the pruned model", 0.96)
        inputs, outputs = names_of(model)
        path = context.work_dir / f"pruned-{student.record.recipe.key[:12]}.onnx"
        exported = export_onnx(student.module, context.example_inputs, path, input_names=inputs, output_names=outputs)
        step = PassStep(
            name=self.name,
            settings=_settings_of(student.record),
            parent=digest_file(model.path) if model.path.is_file() else None,
            output=digest_file(path),
            seconds=time.monotonic() - started,
            versions={package: version(package) for package in PACKAGES},
            notes=(*student.notes, *_describe(student.record), *exported.notes),
        )
        context.on_progress("pruned and distilled", 1.0)
        return WorkModel(path=path, format="onnx", precision="fp32", lineage=(*model.lineage, step), module=student.module)

    def _recipes(self, model: WorkModel, context: PassContext) -> tuple[Recipe, ...]:
        """The recipe of the effort asked for, then those of more effort."""
        parent = digest_state(model.module)  # type: ignore[arg-type]
        task: TrainTask = context.task  # type: ignore[assignment]
        asked = self.epochs[context.effort]
        return tuple(
            Recipe(
                parent=parent,
                data=task.data_digest,
                pruning=PruningSettings(channel_multiple=context.target.channel_multiple, macs_goal=self.macs_goal),
                distillation=DistillationSettings(epochs=epochs),
                seed=context.seed,
            )
            for epochs in sorted({epochs for epochs in self.epochs.values() if epochs >= asked})
        )

    def _find_student(self, model: WorkModel, context: PassContext, recipes: tuple[Recipe, ...]) -> _Student | None:
        for recipe in recipes:
            for folder in _folders(context):
                if record := find_kept(folder, recipe.key):
                    module = load_kept(folder, record, model.module, context.example_inputs)  # type: ignore[arg-type]
                    note = f"weights trained earlier, kept under {recipe.key}"
                    context.on_progress(f"weights trained earlier are at hand ({recipe.key[:12]})", 0.9)
                    return _Student(module=module, record=record, notes=(note,))
        return None

    def _make_student(self, model: WorkModel, context: PassContext, recipe: Recipe) -> _Student:
        task: TrainTask = context.task  # type: ignore[assignment]
        parent: nn.Module = model.module  # type: ignore[assignment]
        inputs = context.example_inputs
        context.on_progress("measuring the importance of each channel", 0.0)
        with _training_errors(task), deterministic(context.seed):
            importance = measure_importance(parent, inputs, task, recipe.pruning, context.seed)
            plan = plan_pruning(parent, inputs, importance, recipe.pruning)
            if not plan:
                raise ArtifactError(
                    "pruning.nothing_to_remove",
                    f"no layer can lose {recipe.pruning.channel_multiple} channels and keep half of its own.",
                    hint="The model is as narrow as the target's kernels; leave pruning out.",
                )
            student = apply_plan(parent, inputs, plan)
        checkpoint = context.work_dir / f"{recipe.key}.checkpoint"
        with _training_errors(task):
            training = train_student(
                student,
                parent,
                task,
                recipe.distillation,
                seed=context.seed,
                checkpoint=checkpoint,
                on_progress=lambda text, done: context.on_progress(text, 0.03 + 0.92 * done),
            )
        weights = encode_weights(student)
        record = KeptRecord(
            recipe=recipe,
            plan=plan,
            widths=widths_of(student),
            macs=count_macs(student, inputs),
            parent_macs=count_macs(parent, inputs),
            training=training,
            weights=digest_bytes(weights),
            versions={package: version(package) for package in PACKAGES},
        )
        note = _keep(context, record, weights)
        checkpoint.unlink(missing_ok=True)
        return _Student(module=student, record=record, notes=(note,))


def _folders(context: PassContext) -> tuple[Path, ...]:
    """Where results are looked for and kept: the task's folder, then the run's."""
    chosen: Path | None = getattr(context.task, "trained_dir", None)
    own = context.work_dir / "trained"
    return (chosen, own) if chosen else (own,)


def _keep(context: PassContext, record: KeptRecord, weights: bytes) -> str:
    """Keep the result in the first folder that takes it; the note for the lineage."""
    *first, own = _folders(context)
    for folder in first:
        try:
            save_kept(folder, record, weights)
        except OSError as error:
            logger.warning("%s: trained weights cannot be kept there (%s), the run's folder has them", folder, error.strerror)
        else:
            return f"weights trained in this run, kept under {record.recipe.key}"
    save_kept(own, record, weights)
    return f"weights trained in this run, kept under {record.recipe.key} in the run's folder"


def _find_pruning_obstacle(module: nn.Module, context: PassContext, settings: PruningSettings) -> str | None:
    try:
        if is_prunable(module, context.example_inputs, settings):
            return None
    except ArtifactError as error:
        return error.message
    return f"no layer can lose {settings.channel_multiple} channels (the target's multiple) and keep half of its own"


@contextmanager
def _training_errors(task: TrainTask) -> Iterator[None]:
    """Name the task in whatever its code raises; edgekit's own errors pass."""
    try:
        yield
    except EdgekitError:
        raise
    except Exception as error:
        raise ArtifactError(
            "training.failed",
            f"{type(task).__name__}: the training failed: {type(error).__name__}: {error}",
            hint="The task's train_batches, loss and metric must fit its model's inputs and output.",
        ) from error


def _find_data_obstacle(task: TrainTask, seed: int) -> str | None:
    try:
        next(iter(task.train_batches(0, seed)), None)
    except DataError as error:
        return f"needs training data, and no weights are kept for these settings: {error.message} {error.hint}".strip()
    return None


def _settings_of(record: KeptRecord) -> dict[str, str | int | float | bool | None]:
    pruning, distillation = record.recipe.pruning, record.recipe.distillation
    return {
        "channel_multiple": pruning.channel_multiple,
        "macs_goal": pruning.macs_goal,
        "importance": pruning.importance,
        "epochs": distillation.epochs,
        "learning_rate": distillation.learning_rate,
        "temperature": distillation.temperature,
        "teacher_weight": distillation.weight,
        "seed": record.recipe.seed,
        "training_data": short(record.recipe.data),
    }


def _describe(record: KeptRecord) -> tuple[str, ...]:
    share = record.macs / record.parent_macs
    kept = ", ".join(f"{part.layer} {part.of}->{part.of - len(part.channels)}" for part in record.plan)
    notes = [
        f"{share:.0%} of the parent's multiply-accumulates ({record.parent_macs:,} -> {record.macs:,})",
        f"channels: {kept}",
    ]
    if record.training.metrics:
        notes.append(f"metric on the training batches after the last epoch: {record.training.metrics[-1]:.4f}")
    return tuple(notes)
