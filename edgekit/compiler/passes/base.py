"""What a pass is: one model in, one model out, with the step that goes into the lineage.

A pass never changes its input file, writes only below ``context.work_dir`` and is deterministic for a given seed. A pass that
does not fit says why in ``find_obstacle`` instead of failing in ``run``.

``target_fields`` names what ``run`` reads of the target: targets that are alike in it share a step's result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from edgekit.dataset.data import Dataset
from edgekit.schema.artifact import ModelFormat
from edgekit.schema.candidate import PassStep
from edgekit.schema.target import TargetProfile

Effort = Literal["fast", "default", "max"]


@dataclass(frozen=True, kw_only=True)
class WorkModel:
    """A model between two passes.

    ``module`` is the torch module (eval mode, on the CPU) that the file was exported from, where there is one.
    """

    path: Path
    format: ModelFormat
    precision: str
    lineage: tuple[PassStep, ...]
    module: Any | None = None


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """What every pass may use. ``on_progress`` takes a line for people and the fraction done of this pass, 0..1."""

    target: TargetProfile
    calibration: Dataset
    work_dir: Path
    seed: int
    effort: Effort
    task: Any | None = None
    """The source's ``TrainTask`` (``edgekit.compiler.task``), where it has one."""
    example_inputs: tuple[Any, ...] = ()
    """Torch tensors, for torch sources."""
    on_progress: Callable[[str, float], None] = field(default=lambda _text, _done: None)


class Pass(Protocol):
    """One transformation."""

    @property
    def name(self) -> str:
        """Stable name, as it stands in the lineage."""

    @property
    def target_fields(self) -> tuple[str, ...]:
        """Fields of the target profile that decide the result of ``run``; nothing else of it may be read there."""

    def find_obstacle(self, model: WorkModel, context: PassContext) -> str | None:
        """Why this pass cannot run on this model, or None when it can."""

    def run(self, model: WorkModel, context: PassContext) -> WorkModel:
        """Make the new model; its lineage is the input's plus one step.

        Raises:
            ArtifactError: when the model cannot be transformed.
        """
