"""Fine-tune the sample model with labelled field samples: ``edgekit recalibrate --train …/finetune.py:train``.

A few epochs of small steps on the old calibration images and the field's, then the mean of the weights before and after
(Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022): what was learned from the field without losing what was
known. Seconds on two cores.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from edgekit.compiler.retrain import Lesson

EPOCHS = 8
BATCH_SIZE = 64
LEARNING_RATE = 8e-3
NEW_SHARE = 0.8
"""Of the tuned weights in the mean."""


def train(lesson: Lesson) -> nn.Module:
    """The tuned network."""
    if lesson.old.labels is None:
        raise ValueError("the old calibration data has no labels")
    images = torch.from_numpy(np.concatenate([lesson.old.inputs["image"], lesson.field.inputs["image"]]))
    labels = torch.from_numpy(np.concatenate([lesson.old.labels, np.asarray(lesson.field.labels)]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # batches are small: a second thread costs more than it gives
    try:
        tuned = _tune(copy.deepcopy(lesson.module), images, labels, lesson)
    finally:
        torch.set_num_threads(threads)
    return _mean(lesson.module, tuned)


def _tune(model: nn.Module, images: Tensor, labels: Tensor, lesson: Lesson) -> nn.Module:
    generator = torch.Generator().manual_seed(lesson.seed)
    steps = len(images) // BATCH_SIZE
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=EPOCHS * steps)
    for epoch in range(EPOCHS):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for step in range(steps):
            chosen = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            flip = torch.rand(BATCH_SIZE, generator=generator) < 0.5
            batch = torch.where(flip[:, None, None, None], images[chosen].flip(3), images[chosen])
            loss = nn.functional.cross_entropy(model(batch), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        lesson.on_progress(f"epoch {epoch + 1} of {EPOCHS}, loss {float(loss.detach()):.3f}", (epoch + 1) / EPOCHS)
    return model.eval()


def _mean(before: nn.Module, after: nn.Module) -> nn.Module:
    """Weights and statistics between both."""
    mixed = copy.deepcopy(after)
    old, new = before.state_dict(), after.state_dict()
    mixed.load_state_dict(
        {
            name: (1 - NEW_SHARE) * old[name] + NEW_SHARE * value if value.is_floating_point() else value
            for name, value in new.items()
        }
    )
    return mixed.eval()
