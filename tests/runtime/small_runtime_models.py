"""Tiny models, written by hand: ONNX graphs by onnx.helper, LiteRT files by the schema's own object API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

Input = tuple[str, Sequence[int], str]


def write_onnx_affine(path: Path, *, batch: int | str = "batch", width: int = 4) -> Path:
    """y = 2 x + 1 for x: float32 [batch, width]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Mul", ["x", "two"], ["doubled"]), helper.make_node("Add", ["doubled", "one"], ["y"])]
    constants = [numpy_helper.from_array(np.full(width, value, np.float32), name) for name, value in (("two", 2), ("one", 1))]
    graph = helper.make_graph(
        nodes,
        "affine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, width])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def write_onnx_reshape(path: Path) -> Path:
    """Reshape to a shape that is itself an input: it can be asked for what cannot be done."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "reshape",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def write_onnx_strings(path: Path) -> Path:
    """Identity of text, which edgekit does not handle."""
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "strings",
        [helper.make_tensor_value_info("x", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def write_tflite_add(
    path: Path,
    *,
    shapes: tuple[Sequence[int], Sequence[int]] = ((1, 4), (1, 4)),
    dtype: str = "float32",
    has_signature: bool = True,
) -> Path:
    """sum = left + right. The tensors are called ``serving_default_args_0:0``; only the signature has the good names."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    types = {"float32": schema.TensorType.FLOAT32, "int8": schema.TensorType.INT8}
    output_shape = [max(a, b) for a, b in zip(*shapes, strict=True)]
    tensors = []
    for name, shape in zip(
        ("serving_default_args_0:0", "serving_default_args_1:0", "StatefulPartitionedCall:0"),
        (*shapes, output_shape),
        strict=True,
    ):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name.encode(), list(shape), types[dtype], 0
        if dtype == "int8":
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale, tensor.quantization.zeroPoint = [1.0], [0]
        tensors.append(tensor)
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0, 1], [2]
    operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.AddOptions, schema.AddOptionsT()
    graph = schema.SubGraphT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = tensors, [operator], [0, 1], [2]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
    code.version = 2 if dtype == "int8" else 1
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [schema.BufferT()]
    if has_signature:
        model.signatureDefs = [_signature(schema)]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def _signature(schema):
    def tensor_map(name: str, index: int):
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name.encode(), index
        return entry

    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
    signature.inputs = [tensor_map("left", 0), tensor_map("right", 1)]
    signature.outputs = [tensor_map("sum", 2)]
    return signature
