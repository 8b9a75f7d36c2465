"""``TrainTask``: what edgekit needs to know to train, so that it can prune and distill.

A task is any object with these members; ``file.py:task`` or ``package.module:task`` names it on the command line in the place
of MODEL. The compiler calls them, and nothing else of the user's training code.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn


@runtime_checkable
class TrainTask(Protocol):
    """A trained model together with the way it is trained."""

    data_digest: str
    """Digest of the training data (``sha256:...``): part of the key under which trained results are kept."""
    trained_dir: Path | None
    """Where trained results are kept and looked for, by content; None keeps them in the run's folder only."""

    def model(self) -> nn.Module:
        """The trained fp32 parent, in eval mode."""

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One batch of each input's shape, batch axis first."""

    def train_batches(self, epoch: int, seed: int) -> Iterable[tuple[tuple[Tensor, ...], Tensor]]:
        """The batches of one epoch, ((inputs...), labels), augmented and shuffled by the seed. May be re-iterated.

        Raises:
            DataError: when the training data is not on this machine.
        """

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The training loss: a scalar."""

    def metric(self, outputs: Tensor, labels: Tensor) -> float:
        """The figure that training reports, higher is better (accuracy in 0..1 for classifiers)."""
