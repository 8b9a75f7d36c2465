"""Read a folder of images: one sub-folder per class, or a flat folder without labels.

Class i is the i-th sub-folder in sorted order (by text, as torchvision and Keras have it; empty ones count). What happens to
an image follows from the input's shape and type alone: turned upright by its EXIF tag, converted to grey (1 channel) or RGB
(3 channels), resized as a whole to the input's height and width (bilinear, the aspect ratio is not kept), laid out
[C, H, W] or [H, W, C], and scaled to 0..1 for a float input; a uint8 input gets 0..255. A model that wants another
normalization needs ``file.py:function`` or an ``.npz``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.dataset.data import Array, spread_indices
from edgekit.dataset.fitting import RawData, describe_shape
from edgekit.errors import DataError, EnvironmentFault
from edgekit.schema.tensor import TensorSpec

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"})
_DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N", "F"})


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How one image lies in the input; ``channel_axis`` is 0, 2 or None (no channel axis)."""

    height: int
    width: int
    channels: int
    channel_axis: int | None


def read_images(folder: Path, inputs: Sequence[TensorSpec], *, limit: int | None = None) -> RawData:
    """Read the images, or with a limit that many of them, evenly spaced over the sorted files.

    Raises:
        DataError: ``data.shape`` or ``data.dtype`` when the model's input is not an image, ``data.empty``,
            ``data.mixed_folder`` or ``data.unreadable``.
        EnvironmentFault: ``pillow.missing``.
    """
    if len(inputs) != 1:
        text = f"{folder}: a folder of images feeds one input, the model has {len(inputs)}."
        raise DataError("data.missing_input", text, hint="Use an .npz with one array per input.")
    spec = inputs[0]
    layout = _layout(spec, folder)
    files, labels, names = _list_images(folder)
    chosen = spread_indices(len(files), limit)
    images = np.stack([_read_image(files[i], int(i), layout) for i in chosen])
    notes = [f"images resized to {layout.width}x{layout.height}, {'grey' if layout.channels == 1 else 'RGB'}"]
    if spec.dtype != "uint8":
        images = images.astype(np.float32) / np.float32(255)
        notes.append("scaled to 0..1")
    if len(chosen) < len(files):
        notes.append(f"{len(chosen)} of {len(files)} images, evenly spaced")
    if names and all(name.isdecimal() for name in names) and list(names) != sorted(names, key=int):
        notes.append(f"class folders are numbers in text order: class 2 is the folder {names[2]}")
    return RawData(
        arrays={spec.name: images}, labels=None if labels is None else labels[chosen], class_names=names, notes=tuple(notes)
    )


def _layout(spec: TensorSpec, folder: Path) -> _Layout:
    if spec.dtype not in ("uint8", "float16", "float32", "float64"):
        text = f'{folder}: input "{spec.name}" is {spec.dtype}; images feed float or uint8 inputs.'
        raise DataError("data.dtype", text, hint="Use an .npz, prepared as the model was trained.")
    tail = spec.shape[1:]
    sizes = [axis for axis in tail if isinstance(axis, int)]
    if len(sizes) == len(tail):
        match sizes:
            case [1 | 3 as channels, height, width]:
                return _Layout(height=height, width=width, channels=channels, channel_axis=0)
            case [height, width, 1 | 3 as channels]:
                return _Layout(height=height, width=width, channels=channels, channel_axis=2)
            case [height, width]:
                return _Layout(height=height, width=width, channels=1, channel_axis=None)
    raise DataError(
        "data.shape",
        f'{folder}: input "{spec.name}" has shape {describe_shape(spec.shape)}; images need [batch, 1 or 3, height, width] '
        "or [batch, height, width, 1 or 3] with fixed sizes.",
        hint="Use an .npz, or export the model with a fixed image size.",
    )


def _images_below(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def _list_images(folder: Path) -> tuple[list[Path], Array | None, tuple[str, ...]]:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    loose = [path for path in entries if path.is_file() and path.suffix.lower() in SUFFIXES]
    by_class = {path.name: _images_below(path) for path in entries if path.is_dir()}
    if not any(by_class.values()):
        by_class = {}
    if loose and by_class:
        text = f"{folder}: {len(loose)} images beside class folders, the first is {loose[0].name}."
        raise DataError("data.mixed_folder", text, hint="Move every image into the folder of its class.")
    if not loose and not by_class:
        text = f"{folder}: no images found; looked for {', '.join(sorted(SUFFIXES))}."
        raise DataError("data.empty", text, hint="Give a folder with one sub-folder of images per class.")
    if loose:
        return loose, None, ()
    labels = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class.values()])
    return [path for files in by_class.values() for path in files], labels.astype(np.int64), tuple(by_class)


def _read_image(path: Path, index: int, layout: _Layout) -> Array:
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415 - only folders of images need it
    except ImportError as error:
        hint = "pip install pillow, or use an .npz."
        raise EnvironmentFault("pillow.missing", f"{path}: reading images needs Pillow.", hint=hint) from error
    try:
        with Image.open(path) as file:
            if file.mode in _DEEP_MODES:
                text = f"{path}: sample {index} has pixels of mode {file.mode}; expected 8 bits per channel."
                raise DataError("data.dtype", text, hint="Convert it to 8 bits, or use an .npz.")
            upright = ImageOps.exif_transpose(file).convert("L" if layout.channels == 1 else "RGB")
            resized = upright.resize((layout.width, layout.height), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        text = f"{path}: sample {index} is not a readable image: {error}."
        raise DataError("data.unreadable", text, hint="Remove or replace the file.") from error
    return _arrange(np.asarray(resized, dtype=np.uint8), layout)


def _arrange(pixels: Array, layout: _Layout) -> Array:
    """uint8 [H, W] or [H, W, 3] in the order of the input."""
    match layout.channel_axis:
        case None:
            return pixels
        case axis if layout.channels == 1:
            return np.expand_dims(pixels, axis)
        case 0:
            return pixels.transpose(2, 0, 1)
        case _:
            return pixels
