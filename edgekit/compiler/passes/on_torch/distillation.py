"""Fine-tuning of a student with its parent as the teacher, resumable after every epoch.

The loss is (1 - weight) * task loss + weight * T^2 * KL(teacher || student) on logits softened by the temperature T for
classifiers (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015); for other models the mean squared
error to the teacher's output takes the place of the KL. AdamW with a one-cycle schedule. At the end the batch norms' running
statistics are taken anew, as plain averages. The same seed, data, torch version and thread count give the same weights.

    >>> train_student(student, teacher, task, settings, seed=0, checkpoint=path, on_progress=print)  # doctest: +SKIP
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.durable import write_durably
from edgekit.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekit.compiler.task import TrainTask

logger = logging.getLogger(__name__)
Progress = Callable[[str, float], None]
PROGRESS_SECONDS = 2.0


class DistillationSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to train. ``weight`` is the teacher's share of the loss."""

    epochs: int
    learning_rate: float = 4e-3
    weight_decay: float = 0.02
    temperature: float = 4.0
    weight: float = 0.7
    warmup_share: float = 0.2
    statistics_batches: int = 100


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the training showed: mean loss and the task's metric on the training batches, by epoch."""

    losses: tuple[float, ...] = ()
    metrics: tuple[float, ...] = ()
    seconds: float = 0.0


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Seeded random numbers and deterministic kernels inside, the caller's state again afterwards."""
    import torch

    before, is_warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)  # noqa: FBT003  torch's own signature
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=is_warn_only)


def is_classifier(outputs: Tensor, labels: Tensor) -> bool:
    """Whether the outputs are logits [N, C] and the labels whole numbers [N]."""
    is_whole = not (labels.is_floating_point() or labels.is_complex())
    return outputs.ndim == 2 and outputs.shape[1] > 1 and labels.ndim == 1 and is_whole


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, task: TrainTask, settings: DistillationSettings
) -> Tensor:
    """The loss of one batch; see the module's text."""
    from torch.nn import functional

    if is_classifier(student, labels):
        t = settings.temperature
        log_p, log_q = functional.log_softmax(teacher / t, 1), functional.log_softmax(student / t, 1)
        match = t * t * functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    else:
        match = functional.mse_loss(student, teacher)
    return (1 - settings.weight) * task.loss(student, labels) + settings.weight * match


def reestimate_statistics(model: nn.Module, task: TrainTask, settings: DistillationSettings, seed: int) -> None:
    """Take the running mean and variance of every batch norm anew, as an average over training batches."""
    import torch
    from torch import nn

    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.inference_mode():
        for batch, _ in itertools.islice(task.train_batches(0, seed), settings.statistics_batches):
            model(*batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


class _Run:
    """One training: everything that a checkpoint holds."""

    def __init__(self, student: nn.Module, settings: DistillationSettings, steps: int) -> None:
        import torch

        self.student = student
        self.settings = settings
        self.steps = steps
        self.epoch = 0
        self.losses: list[float] = []
        self.metrics: list[float] = []
        self.seconds = 0.0
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        total = max(2, steps * settings.epochs) + 1
        warmup = max(settings.warmup_share, 2 / total)  # a phase of no step would divide by zero
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=settings.learning_rate, total_steps=total, pct_start=warmup
        )

    def save(self, path: Path) -> None:
        import torch

        buffer = io.BytesIO()
        state = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "steps": self.steps,
            "losses": self.losses,
            "metrics": self.metrics,
            "seconds": self.seconds,
        }
        torch.save(state, buffer)
        write_durably(path, buffer.getvalue())

    def load(self, path: Path) -> bool:
        """Whether the checkpoint was there and fits."""
        import torch

        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            if state["steps"] != self.steps:
                return False
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            torch.set_rng_state(state["random"])
        except FileNotFoundError:
            return False
        except Exception as error:  # noqa: BLE001  torch.load raises whatever a damaged pickle makes it
            logger.warning("%s: not a usable checkpoint, the training starts anew: %s", path.name, error)
            return False
        self.losses, self.metrics, self.seconds = list(state["losses"]), list(state["metrics"]), state["seconds"]
        self.epoch = len(self.losses)
        return True


class _Clock:
    """Turns steps done into a line with the time left; the rest is taken to run as fast as what this process did."""

    def __init__(self, total: int, done: int, on_progress: Progress) -> None:
        self.total, self.first, self.on_progress = total, done, on_progress
        self.started = self.shown = time.monotonic()

    def tick(self, done: int, text: str) -> None:
        now = time.monotonic()
        if now - self.shown < PROGRESS_SECONDS and done < self.total:
            return
        self.shown = now
        left = (now - self.started) / max(1, done - self.first) * (self.total - done)
        self.on_progress(f"{text}, {_duration(left)} left", done / max(1, self.total))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"


def train_student(
    student: nn.Module,
    teacher: nn.Module,
    task: TrainTask,
    settings: DistillationSettings,
    *,
    seed: int,
    checkpoint: Path,
    on_progress: Progress,
) -> TrainingRecord:
    """Train the student in place; it is in eval mode afterwards.

    Args:
        student: the pruned module, float32.
        teacher: its parent, same inputs and output shape.
        task: batches, loss and metric.
        settings: how.
        seed: of initial random state, shuffling and augmentation.
        checkpoint: written after each epoch, read at the start where it is there; the caller removes it once the
            result is kept.
        on_progress: takes a line and the share done.

    Raises:
        DataError: from the task, when the training data is not there; ``data.empty`` when it yields no batch.
        ArtifactError: ``training.diverged`` when the loss is not a finite number.
    """
    if not any(parameter.requires_grad for parameter in student.parameters()):
        student.requires_grad_(requires_grad=True)  # a parent frozen as a whole was frozen for use, not for training
    with deterministic(seed), _fast_layout(student, teacher):
        teacher.eval()
        steps = _count_batches(task, seed)
        if steps == 0:
            raise DataError("data.empty", "the training task yields no batches.", hint="Check the task's train_batches.")
        run = _Run(student, settings, steps)
        if run.load(checkpoint):
            on_progress(f"distilling: goes on after epoch {run.epoch} of {settings.epochs}", run.epoch / settings.epochs)
        else:
            run = _Run(student, settings, steps)
            reestimate_statistics(student, task, settings, seed)
        clock = _Clock(steps * settings.epochs, steps * run.epoch, on_progress)
        while run.epoch < settings.epochs:
            _train_epoch(run, teacher, task, seed, clock)
            run.save(checkpoint)
        reestimate_statistics(student, task, settings, seed)
    return TrainingRecord(losses=tuple(run.losses), metrics=tuple(run.metrics), seconds=run.seconds)


def _count_batches(task: TrainTask, seed: int) -> int:
    """Batches of one epoch: asked of the task where it knows, else counted."""
    batches = task.train_batches(0, seed)
    return len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)


def _train_epoch(run: _Run, teacher: nn.Module, task: TrainTask, seed: int, clock: _Clock) -> None:
    import torch

    started, loss_sum, metric_sum = time.monotonic(), 0.0, 0.0
    run.student.train()
    for step, (batch, labels) in enumerate(task.train_batches(run.epoch, seed)):
        with torch.no_grad():
            expected = teacher(*batch)
        outputs = run.student(*batch)
        loss = distillation_loss(outputs, expected, labels, task, run.settings)
        run.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
        run.schedule.step()
        loss_sum += float(loss.detach())
        metric_sum += task.metric(outputs.detach(), labels)
        done = run.epoch * run.steps + step + 1
        clock.tick(done, f"distilling: epoch {run.epoch + 1} of {run.settings.epochs}, loss {loss_sum / (step + 1):.3f}")
    if not math.isfinite(loss_sum):
        raise ArtifactError(
            "training.diverged",
            f"distilling: the loss of epoch {run.epoch + 1} is {loss_sum}, expected a finite number.",
            hint="Check the task's loss on the parent's own outputs; scale inputs to about -1..1.",
        )
    run.losses.append(loss_sum / run.steps)
    run.metrics.append(metric_sum / run.steps)
    run.seconds += time.monotonic() - started
    run.epoch += 1
    run.student.eval()


@contextmanager
def _fast_layout(*modules: nn.Module) -> Iterator[None]:
    """Channels-last weights while training: 2-D convolutions are faster so on CPUs. Contiguous again afterwards."""
    import torch
    from torch import nn

    chosen = [module for module in modules if any(isinstance(layer, nn.Conv2d) for layer in module.modules())]
    for module in chosen:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        for module in chosen:
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
