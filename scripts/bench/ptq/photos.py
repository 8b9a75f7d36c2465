"""Photographs out of packages, split by scene, and crops of them.

Every file here was looked at: one picture a scene, none of them a screenshot, chart, drawing or logo. Which files are meant is
written down, not found by size or name, so that a new version of a package cannot change the data. Nothing is downloaded here
and nothing of it is redistributed: ``zoo.py`` unpacks the packages and hands their folders over.

    >>> photographs([Path("skimage/data/coffee.png")])[0].shape  # doctest: +SKIP
    (400, 600, 3)
"""

from __future__ import annotations

import bz2
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

PINS = {"gradio": "6.31.0", "matplotlib": "3.11.2", "scikit-image": "0.26.0", "scipy": "1.9.3", "ultralytics": "8.4.190"}
SCIKIT_IMAGE = tuple(
    f"skimage/data/{name}"
    for name in ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
)
OPENCV_DOC = tuple(
    f"usr/share/doc/opencv-doc/examples/{name}"
    for name in (
        *("data/aero1.jpg", "data/aloeL.jpg", "data/apple.jpg", "data/baboon.jpg", "data/board.jpg", "data/building.jpg"),
        *("data/butterfly.jpg", "data/chicky_512.png", "data/ela_original.jpg", "data/fruits.jpg", "data/home.jpg"),
        *("data/leuvenA.jpg", "data/messi5.jpg", "data/rubberwhale1.png", "data/squirrel_cls.jpg"),
        *("alphamat/input_images/plant.jpg", "hfs/data/000.jpg", "hfs/data/001.jpg", "hfs/data/002.jpg"),
        *(f"text/scenetext0{number}.jpg" for number in range(1, 7)),
        *("text/scenetext_segmented_word01.jpg", "text/scenetext_segmented_word02.jpg"),
    )
)
"""In Debian's package; the other halves of stereo and burst pairs are left out."""
INSTEAD: Mapping[str, tuple[str, ...]] = {
    "gradio": tuple(f"gradio/media_assets/images/{name}.jpg" for name in ("cheetah", "cheetah1", "lion", "tower")),
    "matplotlib": ("matplotlib/mpl-data/sample_data/grace_hopper.jpg",),
    "scikit-image": tuple(f"skimage/data/{name}.png" for name in ("brick", "coins", "grass", "gravel")),
    "scipy": ("scipy/misc/face.dat",),
    "ultralytics": ("ultralytics/assets/bus.jpg", "ultralytics/assets/zidane.jpg"),
}
"""Wheels of PyPI whose photographs stand in where Debian's package cannot be had."""
RACCOON_SHAPE = (768, 1024, 3)
"""Of scipy/misc/face.dat, compressed bytes without a header."""
SMALLEST_CROP = 0.4


def photographs(paths: Iterable[Path]) -> list[np.ndarray]:
    """Pictures uint8 [height, width, 3], in order.

    Raises:
        FileNotFoundError: when one of them is missing.
    """
    from PIL import Image  # noqa: PLC0415 - the lists are of use without it

    found = []
    for path in paths:
        if path.suffix == ".dat":
            found.append(np.frombuffer(bz2.decompress(path.read_bytes()), np.uint8).reshape(RACCOON_SHAPE))
        else:
            with Image.open(path) as image:
                found.append(np.asarray(image.convert("RGB")))
    return found


def crops(pictures: list[np.ndarray], count: int, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Random crops, from 0.4 of the largest that fits to all of it, half of them mirrored, every picture in turn.

    Args:
        pictures: uint8 [height, width, 3] each.
        count: how many.
        shape: height and width of the result, pixels; a crop has the same ratio of sides.
        seed: of places, sizes and mirrors.

    Returns:
        uint8 [count, height, width, 3].
    """
    from PIL import Image  # noqa: PLC0415

    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        scale = generator.uniform(SMALLEST_CROP, 1) * min(picture.shape[0] / shape[0], picture.shape[1] / shape[1])
        height, width = int(shape[0] * scale), int(shape[1] * scale)
        y, x = generator.integers(0, picture.shape[0] - height + 1), generator.integers(0, picture.shape[1] - width + 1)
        image = np.asarray(Image.fromarray(picture[y : y + height, x : x + width]).resize(shape[::-1]))
        made.append(image[:, ::-1] if generator.random() < 0.5 else image)
    return np.stack(made)
