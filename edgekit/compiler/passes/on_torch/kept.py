"""Trained weights, kept by content: what was trained once is not trained again.

``<key>.pt`` is a state dict, ``<key>.json`` says how it came about: the pruning plan (which re-creates the structure without
training data), the settings and the training's course. The key is the SHA-256 of what decides the result in the user's
terms: the parent's weights, the training data's digest, the settings and the seed. Target name, torch version and CPU are
left out on purpose: a result trained on another machine is the same result.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekit.compiler.passes.on_torch.distillation import DistillationSettings, TrainingRecord
from edgekit.compiler.passes.on_torch.pruning import PruningSettings, Removal, apply_plan
from edgekit.durable import write_durably
from edgekit.errors import ArtifactError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.digest import Digest, digest_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

RECIPE = "prune-distill-1"
"""Grows when the algorithm changes so that kept results no longer stand for it."""


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides a result."""

    parent: Digest
    data: Digest
    pruning: PruningSettings
    distillation: DistillationSettings
    seed: int
    recipe: str = RECIPE

    @property
    def key(self) -> str:
        """64 hex digits."""
        return hashlib.sha256(encode_json(self)).hexdigest()


class KeptRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The sidecar of kept weights."""

    recipe: Recipe
    plan: tuple[Removal, ...]
    widths: dict[str, int]
    macs: int
    parent_macs: int
    training: TrainingRecord
    weights: Digest
    versions: dict[str, str]


def digest_state(module: nn.Module) -> str:
    """The digest of a module's state dict: names, types, shapes and values, in order of name."""
    import torch

    parts = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        parts.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        parts.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return "sha256:" + parts.hexdigest()


def save_kept(folder: Path, record: KeptRecord, weights: bytes) -> None:
    """Keep a result; the record is written last, so that a half-written result is never found."""
    write_durably(folder / f"{record.recipe.key}.pt", weights)
    write_durably(folder / f"{record.recipe.key}.json", encode_json(record))


def encode_weights(module: nn.Module) -> bytes:
    """The module's state dict as torch.save writes it."""
    import torch

    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.getvalue()


def find_kept(folder: Path | None, key: str) -> KeptRecord | None:
    """The record kept under this key, or None.

    Raises:
        ArtifactError: ``record.malformed`` when the record is damaged.
    """
    path = folder / f"{key}.json" if folder else None
    if path is None or not path.is_file():
        return None
    return decode_json(path.read_bytes(), KeptRecord, name=path.name)


def load_kept(folder: Path, record: KeptRecord, parent: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """Re-create the pruned module and give it the kept weights.

    Raises:
        ArtifactError: ``weights.digest_mismatch`` when the file changed, ``weights.unloadable`` when it does not fit.
    """
    import torch

    path = folder / f"{record.recipe.key}.pt"
    hint = f"Remove {path.stem}.* from {folder.name}/; the next run trains again."
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError("weights.unloadable", f"{path.name}: {error.strerror}.", hint=hint) from error
    if digest_bytes(data) != record.weights:
        found = digest_bytes(data)
        raise ArtifactError(
            "weights.digest_mismatch", f"{path.name}: digest is {found}, its record says {record.weights}.", hint=hint
        )
    module = apply_plan(parent, inputs, record.plan)
    try:
        module.load_state_dict(torch.load(io.BytesIO(data), weights_only=True), strict=True)
    except RuntimeError as error:
        raise ArtifactError("weights.unloadable", f"{path.name}: does not fit the pruned model: {error}.", hint=hint) from error
    return module.eval()
