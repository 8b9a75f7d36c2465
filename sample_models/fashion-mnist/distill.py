#!/usr/bin/env python3
"""Train the pruned students that ``trained/`` keeps, by the very pass that ``edgekit optimize`` runs.

    python sample_models/fashion-mnist/distill.py --multiple 8 16

Needs the training data (see task.py). What is there already is not trained again. An interrupted run goes on where it was.
``edgekit optimize sample_models/fashion-mnist/task.py:task --target ...`` makes the same files for its target's multiple.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from model import HERE
from task import task
from train import DEBIAN_FOLDER, accuracy, as_input, load_images

from edgekit.compiler.passes.base import PassContext, WorkModel
from edgekit.compiler.passes.on_torch.prune_distill import PruneAndDistill
from edgekit.dataset.data import Dataset
from edgekit.schema.digest import digest_file
from edgekit.schema.target import Int8Rules, TargetProfile


def describe_target(multiple: int) -> TargetProfile:
    """A target of which the pass reads nothing but the channel multiple."""
    return TargetProfile(
        name=f"multiple-{multiple}",
        title=f"channels in multiples of {multiple}",
        arch="x86-64",
        cpu="any",
        isa=(),
        cores=1,
        ram_mb=1024,
        runtime="onnxruntime",
        int8=Int8Rules(),
        channel_multiple=multiple,
        sources={},
    )


def main() -> None:
    """Make each student and print its accuracy on all 10,000 test images."""
    parser = argparse.ArgumentParser(description="Prune and distill the Fashion-MNIST sample model.")
    parser.add_argument("--multiple", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--effort", choices=["fast", "default", "max"], default="default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("edgekit-out/distill"), help="folder for checkpoints and ONNX files")
    arguments = parser.parse_args()
    parent = WorkModel(path=HERE / "model.onnx", format="onnx", precision="fp32", lineage=(), module=task.model())
    arrays = np.load(HERE / "calibration.npz")
    calibration = Dataset(
        inputs={"image": arrays["image"]},
        labels=arrays["labels"],
        class_names=(),
        digest=digest_file(HERE / "calibration.npz"),
        source="calibration.npz",
    )
    images, labels = load_images(DEBIAN_FOLDER, "t10k")
    print(f"parent: top-1 on 10,000 test images {accuracy(parent.module, as_input(images), labels):.4f}")
    for multiple in arguments.multiple:
        context = PassContext(
            target=describe_target(multiple),
            calibration=calibration,
            work_dir=arguments.work,
            seed=arguments.seed,
            effort=arguments.effort,
            task=task,
            example_inputs=task.example_inputs(),
            on_progress=lambda text, done: print(f"{done:4.0%} {text}", flush=True),
        )
        student = PruneAndDistill().run(parent, context)
        print(f"multiple {multiple}: top-1 on 10,000 test images {accuracy(student.module, as_input(images), labels):.4f}")
        for note in student.lineage[-1].notes:
            print(f"  {note}")


if __name__ == "__main__":
    main()
