"""Repair in a QDQ file what its audit found and what needs no new data: signs, shared dequantizers, pairs around nothing.

>>> repaired, notes = repair(proto, audit_runtime(path, feeds))     # doctest: +SKIP
>>> notes                                                          # doctest: +SKIP
('activations int8 -> uint8: 12',)
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.compiler.audit import NO_PAIR, UNSIGNED, audit_runtime, graph_of, name_of
from edgekit.compiler.findings import RuntimeAudit
from edgekit.compiler.qdq import QdqGraph

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

SHIFT = 128
MOST_ROUNDS = 3
"""A repair can bring out the next finding: pairs are looked at only once the types are right."""


def repair(proto: ModelProto, audit: RuntimeAudit) -> tuple[ModelProto, tuple[str, ...]]:
    """Repair in the file what its audit found and what can be repaired without new data: a copy, and what was done.

    The outputs stay within one quantization step. Whether the result is faster is for the caller to measure; it may be audited
    and repaired again, since pairs are looked at only once the types are right.

    Args:
        proto: the model in QDQ form that was audited.
        audit: of that model.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(proto)
    islands = {finding.node for finding in audit.findings if finding.kind == "float-island"}
    repairs = {finding.repair for finding in audit.findings}
    unsigned = _make_unsigned(result) if UNSIGNED in repairs else 0
    split = _split_dequantizers(result, islands)
    loose = {finding.node for finding in audit.findings if finding.repair == NO_PAIR}
    removed = 0 if unsigned else _remove_pairs(result, loose)
    notes = {
        f"activations int8 -> uint8: {unsigned}": unsigned,
        f"DequantizeLinear for a reader of its own: {split}": split,
        f"pairs between two float32 sides removed: {removed}": removed,
    }
    return result, tuple(text for text, count in notes.items() if count)


def repair_fully(proto: ModelProto, audit: RuntimeAudit | None = None) -> tuple[ModelProto, tuple[str, ...]]:
    """Repair, audit the result without running it, repair again, until nothing is found; what was done in all.

    Args:
        proto: a model in QDQ form; it is not changed.
        audit: of that model, where there is one already.

    Raises:
        ArtifactError: ``model.unloadable`` when the runtime refuses the model.
    """
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edgekit-repair-") as folder:
        path = Path(folder) / "model.onnx"
        for _ in range(MOST_ROUNDS):
            if audit is None:
                path.write_bytes(proto.SerializeToString())
                audit = audit_runtime(path, None, is_timed=False)
            proto, done = repair(proto, audit)
            if not done:
                break
            notes.extend(done)
            audit = None
    return proto, tuple(notes)


def _make_unsigned(proto: ModelProto) -> int:
    """Turn int8 activations into uint8 with zero points 128 higher; the number of QuantizeLinear nodes that changed."""
    from onnx import TensorProto, numpy_helper

    graph = graph_of(proto)
    constants = _constants_of(proto)
    shifted: dict[str, str] = {}
    changed = set()
    for node in proto.graph.node:
        nodes = [node, *graph.uses.get(node.output[0], [])]
        if node.op_type != "QuantizeLinear" or not _is_int8_activation(graph, constants, nodes):
            continue
        for item in nodes:
            old = item.input[2]
            if old not in shifted:
                shifted[old] = _free_name(graph, f"{old}_u8")
                values = (numpy_helper.to_array(constants[old]).astype(np.int16) + SHIFT).astype(np.uint8)
                proto.graph.initializer.append(numpy_helper.from_array(values, shifted[old]))
            item.input[2] = shifted[old]
        for attribute in node.attribute:
            if attribute.name == "output_dtype":
                attribute.i = TensorProto.UINT8
        changed.add(node.output[0])
    for value in proto.graph.value_info:
        if value.name in changed:
            value.type.tensor_type.elem_type = TensorProto.UINT8
    return len(changed)


def _constants_of(proto: ModelProto) -> dict[str, TensorProto]:
    """Initializers, and tensors of Constant nodes."""
    constants = {item.name: item for item in proto.graph.initializer}
    makers = [node for node in proto.graph.node if node.op_type == "Constant"]
    return constants | {node.output[0]: item.t for node in makers for item in node.attribute if item.name == "value"}


def _is_int8_activation(graph: QdqGraph, constants: Mapping[str, TensorProto], nodes: list[NodeProto]) -> bool:
    """Whether a QuantizeLinear and its readers are an activation in int8 that nothing but DequantizeLinear reads."""
    from onnx import TensorProto

    first, *readers = nodes
    places = [constants.get(node.input[2]) if len(node.input) > 2 else None for node in nodes]
    return (
        bool(readers)
        and first.input[0] not in constants
        and first.output[0] not in graph.outputs
        and all(node.op_type == "DequantizeLinear" for node in readers)
        and all(place is not None and place.data_type == TensorProto.INT8 for place in places)
    )


def _free_name(graph: QdqGraph, wanted: str) -> str:
    name = wanted
    while name in graph.initializers or name in graph.makers or name in graph.uses:
        name += "_"
    return name


def _split_dequantizers(proto: ModelProto, islands: set[str]) -> int:
    """Give each reader of an activation its own DequantizeLinear where one of the readers stayed float; the number added."""
    graph = graph_of(proto)
    nodes: list[Any] = []
    added = 0
    for node in proto.graph.node:
        nodes.append(node)
        if node.op_type != "DequantizeLinear" or node.input[0] in graph.initializers:
            continue
        readers = list({name_of(user): user for user in graph.uses.get(node.output[0], [])}.values())
        if len(readers) < 2 or not islands & {name_of(user) for user in readers}:
            continue
        for number, reader in enumerate(readers[1:], 1):
            twin = type(node)()
            twin.CopyFrom(node)
            twin.name = f"{name_of(node)}_{number}"
            twin.output[0] = _free_name(graph, f"{node.output[0]}_{number}")
            graph.makers[twin.output[0]] = twin
            reader.input[:] = [twin.output[0] if name == node.output[0] else name for name in reader.input]
            nodes.append(twin)
            added += 1
    _put_nodes(proto, nodes)
    return added


def _remove_pairs(proto: ModelProto, loose: set[str]) -> int:
    """Take out the named QuantizeLinear nodes with the DequantizeLinear nodes behind them; the number removed."""
    graph = graph_of(proto)
    gone: set[str] = set()
    sources: dict[str, str] = {}
    for node in proto.graph.node:
        ends = graph.uses.get(node.output[0], []) if node.op_type == "QuantizeLinear" and name_of(node) in loose else []
        if not ends or node.output[0] in graph.outputs or any(end.op_type != "DequantizeLinear" for end in ends):
            continue
        gone.add(node.output[0])
        sources |= {end.output[0]: node.input[0] for end in ends}
    nodes: list[Any] = []
    for node in proto.graph.node:
        node.input[:] = [sources.get(name, name) for name in node.input]
        if node.output[0] in sources and node.output[0] in graph.outputs:
            twin = type(node)(op_type="Identity", name=name_of(node), input=[sources[node.output[0]]], output=[node.output[0]])
            nodes.append(twin)
        elif node.output[0] not in gone and node.output[0] not in sources:
            nodes.append(node)
    _put_nodes(proto, nodes)
    return len(gone)


def _put_nodes(proto: ModelProto, nodes: list[Any]) -> None:
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
