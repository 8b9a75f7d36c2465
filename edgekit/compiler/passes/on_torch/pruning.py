"""Structured pruning: whole channels leave, in blocks of the target's channel multiple.

Channels that must leave together (residual sums, batch norms, the next layer's inputs) come from Torch-Pruning's dependency
graph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023). A channel's importance is the first-order Taylor
estimate of what its removal does to the loss (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR
2019), averaged over training batches. ``plan_pruning`` then removes, one block after another, the block with the least
importance per multiply-accumulate saved, until the goal is reached.

Blocks, because a kernel works on 8 or 16 channels at a time: a layer of 63 channels is slower than one of 64. Groups whose
removal changes the model's output or breaks its forward pass (found by trying on a copy) are left alone. The plan is data:
``apply_plan`` on the same parent gives the same structure anywhere, without training data.

    >>> plan = plan_pruning(parent, inputs, importance, PruningSettings(channel_multiple=8))  # doctest: +SKIP
    >>> student = apply_plan(parent, inputs, plan)                                            # doctest: +SKIP
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.compiler.export import quiet
from edgekit.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgekit.compiler.task import TrainTask


class PruningSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How far to prune.

    ``macs_goal`` is the share of the parent's multiply-accumulates to come down to; a group of channels never loses more than
    1 - ``least_share`` of itself, so the goal may stay out of reach.
    """

    channel_multiple: int
    macs_goal: float = 0.5
    least_share: float = 0.5
    importance: str = "taylor"
    importance_batches: int = 20


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """Output channels that leave one layer, and with it the whole group that depends on them."""

    layer: str
    channels: tuple[int, ...]
    of: int
    """How many output channels the layer had."""


Plan = tuple[Removal, ...]


@contextmanager
def _gradients_on(module: nn.Module) -> Iterator[None]:
    """Torch-Pruning traces through autograd: every parameter must take part, whatever the caller froze."""
    import torch

    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, _ in before:
        parameter.requires_grad = True
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, is_on in before:
            parameter.requires_grad = is_on


def _build_graph(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    import torch_pruning

    try:
        with _gradients_on(module), quiet():
            return torch_pruning.DependencyGraph().build_dependency(module, example_inputs=inputs, verbose=False)
    except Exception as error:
        raise ArtifactError(
            "pruning.untraceable",
            f"{type(module).__name__}: Torch-Pruning cannot trace it: {type(error).__name__}: {error}",
            hint="Channels can be removed only where the forward pass runs on the example inputs with gradients.",
        ) from error


def _name_of(module: nn.Module, layer: nn.Module) -> str:
    found: str = next(name for name, candidate in module.named_modules() if candidate is layer)
    return found


def count_macs(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of all convolutions and linear layers for one sample."""
    return sum(_macs_by_layer(module, inputs).values())


def _macs_by_layer(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    import torch
    from torch import nn

    macs: dict[str, int] = {}
    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):

            def hook(layer: Any, _inputs: Any, output: Tensor, name: str = name) -> None:
                per_value = layer.weight[0].numel()
                macs[name] = macs.get(name, 0) + output[0].numel() * per_value

            hooks.append(layer.register_forward_hook(hook))
    try:
        with torch.inference_mode():
            module(*inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return macs


def measure_importance(
    module: nn.Module, inputs: tuple[Tensor, ...], task: TrainTask, settings: PruningSettings, seed: int
) -> dict[str, list[float]]:
    """Taylor importance of each channel, by the name of the group's first layer.

    Args:
        module: the trained parent; it is copied, not changed.
        inputs: example inputs.
        task: gives batches and loss.
        settings: how many batches.
        seed: shuffles the batches.

    Raises:
        DataError: from the task, when the training data is not there.
    """
    import torch
    import torch_pruning

    copied = copy.deepcopy(module).eval()
    graph = _build_graph(copied, inputs)
    scorer = torch_pruning.importance.GroupTaylorImportance(group_reduction="mean", normalizer=None, multivariable=True)
    groups = {_name_of(copied, group[0].dep.target.module): group for group in graph.get_all_groups()}
    totals: dict[str, Tensor] = {}
    with _gradients_on(copied):
        for count, (batch, labels) in enumerate(task.train_batches(0, seed)):
            if count == settings.importance_batches:
                break
            copied.zero_grad(set_to_none=True)
            task.loss(copied(*batch), labels).backward()  # type: ignore[no-untyped-call]
            for name, group in groups.items():
                score = scorer(group)
                if score is not None:
                    totals[name] = totals.get(name, torch.zeros_like(score)) + score
    return {name: [float(value) for value in total] for name, total in totals.items()}


class _Group:
    """A prunable group during the planning: which layers it narrows, and which block would leave next."""

    def __init__(self, name: str, importance: list[float], members: list[str]) -> None:
        self.name = name
        self.importance = importance
        self.members = members
        """Layers that it narrows; one that it narrows on both sides stands here twice."""
        self.order = sorted(range(len(importance)), key=lambda channel: (importance[channel], channel))
        self.removed = 0

    @property
    def kept(self) -> int:
        return len(self.order) - self.removed

    def next_block(self, settings: PruningSettings) -> int:
        """How many channels the next removal takes; 0 when the group may lose none."""
        size = self.kept % settings.channel_multiple or settings.channel_multiple
        left = self.kept - size
        return size if left >= max(settings.channel_multiple, settings.least_share * len(self.order)) else 0

    def cost(self, size: int) -> float:
        """Importance of the next ``size`` channels."""
        return sum(self.importance[channel] for channel in self.order[self.removed : self.removed + size])


def _is_removable(module: nn.Module, inputs: tuple[Tensor, ...], name: str, size: int) -> bool:
    """Whether the model still gives an output of the same shape when the group of this layer loses channels."""
    import torch

    try:
        pruned = apply_plan(module, inputs, (Removal(layer=name, channels=tuple(range(size)), of=_out_channels(module, name)),))
        with torch.inference_mode():
            return bool(_shape_of(pruned(*inputs)) == _shape_of(module(*inputs)))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError, ArtifactError):
        return False


def _shape_of(output: Any) -> Any:
    return tuple(output.shape) if hasattr(output, "shape") else tuple(_shape_of(part) for part in output)


def _out_channels(module: nn.Module, name: str) -> int:
    return int(getattr(module.get_submodule(name), "out_channels", 0) or getattr(module.get_submodule(name), "out_features", 0))


def _find_groups(
    module: nn.Module, inputs: tuple[Tensor, ...], importance: dict[str, list[float]], settings: PruningSettings
) -> list[_Group]:
    from torch import nn

    copied = copy.deepcopy(module).eval()
    graph = _build_graph(copied, inputs)
    names = {layer: name for name, layer in copied.named_modules()}
    groups = []
    for found in graph.get_all_groups():
        name = names[found[0].dep.target.module]
        layers = [dep.target.module for dep, _ in found]
        members = [names[layer] for layer in layers if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
        group = _Group(name, importance.get(name, []), members)
        size = group.next_block(settings) if group.importance else 0
        if size and _is_removable(module, inputs, name, size):
            groups.append(group)
    return groups


def is_prunable(module: nn.Module, inputs: tuple[Tensor, ...], settings: PruningSettings) -> bool:
    """Whether any group of channels can lose a whole block. Needs no training data."""
    from torch import nn

    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    flat = {name: [1.0] * _out_channels(module, name) for name, layer in module.named_modules() if isinstance(layer, layers)}
    return bool(_find_groups(module, inputs, flat, settings))


def plan_pruning(
    module: nn.Module, inputs: tuple[Tensor, ...], importance: dict[str, list[float]], settings: PruningSettings
) -> Plan:
    """Choose the channels that leave.

    Args:
        module: the parent, eval mode; not changed.
        inputs: example inputs.
        importance: from :func:`measure_importance`.
        settings: multiple, goal and limit.

    Returns:
        The plan; empty when no group can lose a whole block.
    """
    macs = {name: float(count) for name, count in _macs_by_layer(module, inputs).items()}
    goal = settings.macs_goal * sum(macs.values())
    groups = _find_groups(module, inputs, importance, settings)
    while sum(macs.values()) > goal:
        options = []
        for group in groups:
            if size := group.next_block(settings):
                saved = sum(macs.get(layer, 0.0) for layer in group.members) * size / group.kept
                options.append((group.cost(size) / max(saved, 1.0), group.name, size, group))
        if not options:
            break
        _, _, size, group = min(options, key=lambda option: option[:2])
        for layer in group.members:
            if layer in macs:
                macs[layer] *= (group.kept - size) / group.kept
        group.removed += size
    return tuple(
        Removal(layer=group.name, channels=tuple(sorted(group.order[: group.removed])), of=len(group.order))
        for group in groups
        if group.removed
    )


def apply_plan(module: nn.Module, inputs: tuple[Tensor, ...], plan: Plan) -> nn.Module:
    """A pruned copy of the module, eval mode.

    Raises:
        ArtifactError: ``pruning.plan_mismatch`` when the plan names a layer that the module does not have so.
    """
    copied = copy.deepcopy(module).eval()
    graph = _build_graph(copied, inputs)
    layers = dict(copied.named_modules())
    for removal in plan:
        layer = layers.get(removal.layer)
        if layer is None or _out_channels(copied, removal.layer) != removal.of:
            raise ArtifactError(
                "pruning.plan_mismatch",
                f"{removal.layer}: the pruning plan expects a layer of {removal.of} output channels there.",
                hint="The plan belongs to another parent model; prune again.",
            )
        pruner = graph.get_pruner_of_module(layer)
        with _gradients_on(copied):
            graph.get_pruning_group(layer, pruner.prune_out_channels, list(removal.channels)).prune()
    copied.zero_grad(set_to_none=True)
    return copied


def widths_of(module: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer, by name."""
    return {name: width for name, _ in module.named_modules() if (width := _out_channels(module, name))}
