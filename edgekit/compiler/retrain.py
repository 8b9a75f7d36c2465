"""Training with field samples by the user's own function: the model goes in, a better one comes out, as an ONNX file.

The function is named ``package.module:function`` or ``file.py:function``, takes one :class:`Lesson` and returns a torch module,
or the path of an ONNX file that it wrote. It never sees the samples that the verdict rests on.

    def train(lesson):                                  # in finetune.py
        model = copy.deepcopy(lesson.module)
        ...  # lesson.old, lesson.field: arrays by input name, and labels
        return model
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.compiler.export import export_onnx
from edgekit.compiler.passes.on_torch.distillation import deterministic
from edgekit.compiler.source import Source
from edgekit.dataset.data import Dataset
from edgekit.dataset.function import load_attribute
from edgekit.durable import write_durably
from edgekit.errors import EdgekitError, EnvironmentFault, UsageError
from edgekit.schema.contract import Contract

if TYPE_CHECKING:
    from torch import Tensor


def _quiet(_text: str, _done: float) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a training function gets."""

    module: Any
    """The torch model as it is, in eval mode; None where MODEL is an ONNX file."""
    path: Path | None
    """MODEL where it is an ONNX file."""
    old: Dataset
    """The calibration data, with labels where it has them: what must not be forgotten."""
    field: Dataset
    """Labelled field samples to learn from."""
    seed: int
    on_progress: Callable[[str, float], None] = _quiet
    """Takes a line for people and the fraction done, 0..1."""


def retrain(spec: str, source: Source, lesson: Lesson, *, contract: Contract, out: Path) -> Path:
    """Train, and write the result as an ONNX file with the contract's names.

    Args:
        spec: the function.
        source: the model.
        lesson: what it gets; its ``module`` and ``path`` are the source's.
        contract: of the release that serves.
        out: the file to write.

    Raises:
        UsageError: ``train.not_found``, ``train.failed`` with what the function raised, ``train.result`` for another result.
        ArtifactError: when what it returned cannot be exported.
        EnvironmentFault: ``package.missing`` without torch.
    """
    function = load_attribute(spec)
    if not callable(function):
        raise UsageError("train.not_found", f"--train {spec}: not callable.", hint="It takes one argument, the lesson.")
    try:
        with deterministic(lesson.seed):
            made = function(lesson)
    except EdgekitError:
        raise
    except ImportError as error:
        raise EnvironmentFault(
            "package.missing", f"--train {spec}: {error}.", hint='pip install "edgekit[optimize]"'
        ) from error
    except Exception as error:
        raise UsageError("train.failed", f"--train {spec}: {type(error).__name__}: {error}.") from error
    if isinstance(made, str | Path):
        write_durably(out, _read(Path(made), spec))
        return out
    if not hasattr(made, "state_dict"):
        raise UsageError(
            "train.result",
            f"--train {spec}: returned {type(made).__name__}.",
            hint="Return a torch module, or the path of an ONNX file.",
        )
    export_onnx(
        made.cpu().float().eval(),
        _examples(source, lesson, contract),
        out,
        input_names=[each.name for each in contract.inputs],
        output_names=[each.name for each in contract.outputs],
    )
    return out


def _read(path: Path, spec: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError("train.result", f"--train {spec}: returned {path}, which cannot be read: {error}.") from error


def _examples(source: Source, lesson: Lesson, contract: Contract) -> tuple[Tensor, ...]:
    """The source's own example inputs, or one sample of the old data."""
    if source.example_inputs:
        return source.example_inputs
    import torch

    return tuple(torch.from_numpy(lesson.old.inputs[each.name][:1].copy()) for each in contract.inputs)
