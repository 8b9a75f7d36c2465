"""The plan: which candidates a run makes, and by which passes. The dry run prints what the real run executes.

Passes are named by ``module:class`` and imported when they are needed, since some of them load frameworks for seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, assert_never

from edgekit.compiler.passes.base import Effort, Pass
from edgekit.schema.base import Scalar
from edgekit.schema.target import TargetProfile

BASELINE = "fp32"
ROOT = "edgekit.compiler.passes"


@dataclass(frozen=True, kw_only=True)
class PassSpec:
    """A pass by name, with the settings it is made with."""

    name: str
    where: str
    settings: Mapping[str, Scalar] = field(default_factory=dict)

    def load(self) -> Pass:
        """Import and make the pass."""
        module, _, attribute = self.where.rpartition(":")
        made: Pass = getattr(importlib.import_module(f"{ROOT}.{module}"), attribute)(**self.settings)
        return made

    def describe(self) -> str:
        """The pass with its settings, for people."""
        inner = ", ".join(f"{key}={value}" for key, value in self.settings.items() if value is not None)
        return f"{self.name}({inner})" if inner else self.name


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One candidate: its name, what it is for, and the passes that make it from the imported source."""

    name: str
    purpose: str
    passes: tuple[PassSpec, ...] = ()


IMPORT_ONNX = PassSpec(name="import-onnx", where="on_onnx.import_onnx:ImportOnnx")
EXPORT_ONNX = PassSpec(name="export-onnx", where="on_torch.export:ExportOnnx")
OPTIMIZE = PassSpec(name="optimize-graph", where="on_onnx.optimize:OptimizeGraph")
PRUNE = PassSpec(name="prune-and-distill", where="on_torch.prune_distill:PruneAndDistill")
DYNAMIC = PassSpec(name="quantize-dynamic", where="on_onnx.quantize_dynamic:QuantizeDynamic")
NEURAL_COMPRESSOR = PassSpec(name="neural-compressor-pt2e", where="on_torch.neural_compressor:NeuralCompressorStatic")
TO_LITERT = PassSpec(name="convert-to-litert", where="on_litert.convert:ConvertToLiteRT")
LITERT_INT8 = PassSpec(name="quantize-litert-int8", where="on_litert.quantize:QuantizeLiteRT")


def quantize(**settings: Scalar) -> PassSpec:
    """A static int8 pass with settings of its own."""
    return PassSpec(name="quantize-static", where="on_onnx.quantize_static:QuantizeStatic", settings=settings)


HALVE = PassSpec(name="halve-weights", where="on_onnx.weights_only:HalveWeights")
EQUALIZE = PassSpec(name="equalize-channels", where="on_onnx.equalize_channels:EqualizeChannels")
REPAIR = PassSpec(name="repair-graph", where="on_onnx.repair_graph:RepairGraph")
WEIGHTS = PassSpec(name="quantize-weights", where="on_onnx.weights_only:QuantizeWeights")
PLANNED = PassSpec(name="quantize-planned", where="on_onnx.quantize_planned:QuantizePlanned")

KEEPING = frozenset({"quantize-static", "quantize-planned"})
"""Passes that can keep the scales of a previous release."""


def all_passes() -> tuple[PassSpec, ...]:
    """Every pass there is, by name."""
    static = PassSpec(name="quantize-static", where="on_onnx.quantize_static:QuantizeStatic")
    onnx = (IMPORT_ONNX, EXPORT_ONNX, OPTIMIZE, EQUALIZE, static, PLANNED, DYNAMIC, HALVE, WEIGHTS, REPAIR)
    return (*onnx, PRUNE, NEURAL_COMPRESSOR, TO_LITERT, LITERT_INT8)


def source_pass(kind: Literal["onnx", "torch"]) -> PassSpec:
    """The pass that turns the source into the ONNX file that everything starts from."""
    match kind:
        case "onnx":
            return IMPORT_ONNX
        case "torch":
            return EXPORT_ONNX
        case _:
            assert_never(kind)


def plan_recipes(target: TargetProfile, effort: Effort, *, has_task: bool, has_module: bool = False) -> tuple[Recipe, ...]:
    """All candidates of a run in the order they are made; the first one is the baseline.

    Args:
        target: decides the format and the int8 rules.
        effort: ``fast`` makes the two or three that matter most, ``max`` every variant there is.
        has_task: whether the source can be trained, so that it can be pruned.
        has_module: whether the source is a torch module, which Neural Compressor starts from.
    """
    match target.runtime:
        case "onnxruntime":
            compressed = _compressed(target) if has_module and effort != "fast" else ()
            return (*_onnx_recipes(target, effort), *compressed, *(_pruned_onnx(target, effort) if has_task else ()))
        case "litert" | "tflm":
            return (*_litert_recipes(), *(_pruned_litert() if has_task and effort != "fast" else ()))
        case _:
            assert_never(target.runtime)


def _onnx_recipes(target: TargetProfile, effort: Effort) -> tuple[Recipe, ...]:
    is_per_channel = target.int8.per_channel
    main = "int8-per-channel" if is_per_channel else "int8-per-tensor"
    recipes = [
        Recipe(name=BASELINE, purpose="the model as given"),
        Recipe(name="fp32-optimized", purpose="cleaned and fused, float32", passes=(OPTIMIZE,)),
        Recipe(name=main, purpose="static int8", passes=(OPTIMIZE, quantize(is_per_channel=is_per_channel))),
    ]
    if effort == "fast":
        return tuple(recipes)

    def add(name: str, purpose: str, **settings: Scalar) -> None:
        recipes.append(Recipe(name=name, purpose=purpose, passes=(OPTIMIZE, quantize(**settings))))

    if is_per_channel:
        add("int8-per-tensor", "static int8, one scale per tensor", is_per_channel=False)
    add("int8-mse", "static int8, ranges of least squared error", is_per_channel=is_per_channel, method="mse")
    add("int8-edges-fp32", "static int8, first and last layer in fp32", is_per_channel=is_per_channel, kept="edges")
    recipes.append(Recipe(name="int8-dynamic", purpose="int8 weights, ranges at run time", passes=(OPTIMIZE, DYNAMIC)))
    recipes.append(Recipe(name="fp16-weights", purpose="half the size, computed in fp32", passes=(OPTIMIZE, HALVE)))
    if effort == "max":
        add("int8-percentile", "static int8, outliers clipped", is_per_channel=is_per_channel, method="percentile")
        add("int8-edges-mse", "both of the above", is_per_channel=is_per_channel, kept="edges", method="mse")
        other = not target.int8.reduce_range
        name = "int8-7bit" if other else "int8-8bit"
        for bits in (8, 4):
            small = replace(WEIGHTS, settings={"bits": bits})
            purpose = f"{bits}-bit weights of matrix products, computed in fp32"
            recipes.append(Recipe(name=f"int{bits}-weights", purpose=purpose, passes=(OPTIMIZE, small)))
        fitted = replace(WEIGHTS, settings={"bits": 4, "algorithm": "hqq"})
        recipes.append(Recipe(name="int4-weights-hqq", purpose="4-bit weights, zero points fitted", passes=(OPTIMIZE, fitted)))
        add(name, "the other range of weights", is_per_channel=is_per_channel, reduce_range=other)
    return tuple(recipes)


def _compressed(target: TargetProfile) -> tuple[Recipe, ...]:
    """Neural Compressor's candidate, where its package is installed: without it there is nothing to say about it."""
    if target.int8.format != "qdq" or importlib.util.find_spec("neural_compressor") is None:
        return ()
    return (Recipe(name="int8-inc", purpose="static int8 by Intel Neural Compressor", passes=(NEURAL_COMPRESSOR,)),)


def _pruned_onnx(target: TargetProfile, effort: Effort) -> tuple[Recipe, ...]:
    int8 = (PRUNE, OPTIMIZE, quantize(is_per_channel=target.int8.per_channel))
    recipes = (
        Recipe(name="pruned-fp32", purpose="half the arithmetic, distilled", passes=(PRUNE, OPTIMIZE)),
        Recipe(name="pruned-int8", purpose="pruned, distilled, static int8", passes=int8),
    )
    return recipes if effort != "fast" else ()


def _litert_recipes() -> tuple[Recipe, ...]:
    return (
        Recipe(name=BASELINE, purpose="the model as given, for LiteRT", passes=(TO_LITERT,)),
        Recipe(name="int8", purpose="full-integer int8", passes=(TO_LITERT, LITERT_INT8)),
    )


def _pruned_litert() -> tuple[Recipe, ...]:
    return (
        Recipe(name="pruned-fp32", purpose="half the arithmetic, distilled", passes=(PRUNE, TO_LITERT)),
        Recipe(name="pruned-int8", purpose="pruned, distilled, int8", passes=(PRUNE, TO_LITERT, LITERT_INT8)),
    )
