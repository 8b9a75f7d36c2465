"""Networks of the benchmark that are built here: trained on Fashion-MNIST, or filled with weights out of a package.

>>> export(encoder(Path("model.safetensors")), example, folder, ["input_ids", "attention_mask"], ["sentence"])  # doctest: +SKIP
"""

# ruff: noqa: PLC0415  frameworks take seconds to import
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sources import SEED, say


def classifier(activation: str) -> Any:
    """A small inverted-residual torch module for images [N, 1, 28, 28] and ten classes; ``activation`` is silu or relu6."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    act = {"silu": nn.SiLU, "relu6": nn.ReLU6}[activation]

    class Block(nn.Module):
        def __init__(self, before: int, after: int, stride: int) -> None:
            super().__init__()
            wide = before * 3
            self.is_residual = before == after and stride == 1
            self.layers = nn.Sequential(
                *(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), act()),
                *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), act()),
                *(nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layers(x)
            return x + y if self.is_residual else y

    plan = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1)]
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), act()),
        *(Block(*sizes) for sizes in plan),
        *(nn.Conv2d(40, 96, 1, bias=False), nn.BatchNorm2d(96), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(96, 10),
    )


def train(net: Any, images: np.ndarray, labels: np.ndarray) -> None:
    """Train a classifier on all of these images for three epochs, with two threads: the weights depend on their number.

    Args:
        net: a torch module that gives logits.
        images: float32 [N, 1, 28, 28].
        labels: int64 [N].
    """
    import torch
    from torch import nn

    torch.set_num_threads(2)
    order = np.arange(len(images))
    epochs, size = 3, 64
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    steps = epochs * len(order) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
    for epoch in range(epochs):
        say(f"  training, epoch {epoch + 1} of {epochs}")
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            loss = nn.functional.cross_entropy(net(torch.from_numpy(images[chosen])), torch.from_numpy(labels[chosen]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        np.random.default_rng(SEED + 1).shuffle(order)


def export(net: Any, example: tuple[Any, ...], folder: Path, inputs: list[str], outputs: list[str]) -> None:
    """Self-contained ONNX with a free batch axis."""
    import torch

    batch = torch.export.Dim("batch")
    torch.onnx.export(
        net, example, folder / "model.onnx", dynamo=True, external_data=False, opset_version=18, verbose=False,
        input_names=inputs, output_names=outputs, dynamic_shapes=tuple({0: batch} for _ in example),
    )  # fmt: skip


def encoder(path: Path) -> Any:
    """all-MiniLM-L6-v2 as a torch module with the weights of this file: mean-pooled, normalized embeddings of 64 tokens."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    weights = {name.removeprefix("bert."): value for name, value in load_file(path).items()}

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(384, 384) for _ in range(4))
            self.up, self.down = nn.Linear(384, 1536), nn.Linear(1536, 384)
            self.norm1, self.norm2 = nn.LayerNorm(384, eps=1e-12), nn.LayerNorm(384, eps=1e-12)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            q, k, v = (part(x).view(-1, 64, 12, 32).transpose(1, 2) for part in (self.query, self.key, self.value))
            scores = torch.matmul(q, k.transpose(2, 3)) / 32**0.5 + mask
            mixed = torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).reshape(-1, 64, 384)
            x = self.norm1(x + self.out(mixed))
            return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(30522, 384), nn.Parameter(torch.zeros(1, 64, 384))
            self.norm = nn.LayerNorm(384, eps=1e-12)
            self.layers = nn.ModuleList(Layer() for _ in range(6))

        def forward(self, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
            kept = attention.to(torch.float32)
            x = self.norm(self.words(ids) + self.places)
            mask = ((1 - kept) * -10000.0)[:, None, None, :]
            for layer in self.layers:
                x = layer(x, mask)
            pooled = (x * kept[:, :, None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
            return pooled / pooled.norm(dim=1, keepdim=True)

    net = Encoder()
    state = {"words.weight": weights["embeddings.word_embeddings.weight"]}
    types = weights["embeddings.token_type_embeddings.weight"][0]
    state["places"] = (weights["embeddings.position_embeddings.weight"][:64] + types)[None]
    names = {"attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
             "attention.output.dense": "out", "attention.output.LayerNorm": "norm1", "intermediate.dense": "up",
             "output.dense": "down", "output.LayerNorm": "norm2"}  # fmt: skip
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = weights[f"embeddings.LayerNorm.{kind}"]
        for layer in range(6):
            for theirs, own in names.items():
                state[f"layers.{layer}.{own}.{kind}"] = weights[f"encoder.layer.{layer}.{theirs}.{kind}"]
    net.load_state_dict(state)
    return net.eval()


def save_batch_first(source: Path, path: Path) -> None:
    """The same network with the sample as the state's first axis: [1, 2, 128] in and out."""
    import onnx
    from onnx import helper

    model = onnx.load(source)
    graph = model.graph
    for value in (graph.input[1], graph.output[1]):
        inner, outer = f"{value.name}_inner", value.name
        for node in graph.node:
            node.input[:] = [inner if name == outer else name for name in node.input]
            node.output[:] = [inner if name == outer else name for name in node.output]
        is_input = value is graph.input[1]
        ends = (outer, inner) if is_input else (inner, outer)
        node = helper.make_node("Transpose", [ends[0]], [ends[1]], perm=[1, 0, 2], name=f"{outer}_first")
        graph.node.insert(0 if is_input else len(graph.node), node)
        value.CopyFrom(helper.make_tensor_value_info(outer, onnx.TensorProto.FLOAT, [1, 2, 128]))
    onnx.checker.check_model(model)
    onnx.save(model, path)
