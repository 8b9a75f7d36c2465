"""Saturating int16 sums: counted and simulated as an AVX2 processor without VNNI has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_graphs import build, value

from edgekit.compiler.saturation import cannot_saturate, count_saturation, simulate_saturation
from edgekit.dataset.data import Dataset, make_dataset

X_SCALE, X_ZERO, Y_SCALE = 0.02, 37, 0.05
UNSIGNED = np.uint8(X_ZERO)
Array = Any


def full_range(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Int8 weights wide enough that many pairs can overflow."""
    return np.clip(np.round(np.random.default_rng(seed).normal(size=shape) * 100), -127, 127).astype(np.int8)


def samples(shape: tuple[int, ...], seed: int = 1) -> Dataset:
    """Inputs that fill the range, a third of them at its top."""
    values = np.random.default_rng(seed).normal(size=shape) * 5
    return make_dataset({"x": np.minimum(np.abs(values) - 0.5, 4.4).astype(np.float32)}, source="here")


def stored_input(data: Dataset) -> Array:
    return np.clip(np.round(data.inputs["x"] / np.float32(X_SCALE)) + X_ZERO, 0, 255).astype(np.int64)


def single(
    kind: str, rank: int, weights: Array, *, zero: Any = UNSIGNED, ending: str = "quantized", **attributes: Any
) -> onnx.ModelProto:
    """One layer in QDQ form; ``ending``: what follows it. Output ``y`` float32."""
    axis = 0 if kind == "Conv" or attributes.get("transB") else 1
    unit = scales(weights.shape[axis], weights.size)
    result_zero = zero.dtype.type(0 if ending == "relu" else 100)
    constants = {"xs": np.float32(X_SCALE), "xz": zero, "w": weights, "ws": unit, "wz": np.zeros(len(unit), np.int8)}
    constants |= {"ys": np.float32(Y_SCALE), "yz": result_zero}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=axis),
        helper.make_node(kind, ["xd", "wd"], ["y" if ending == "float" else "r"], name="layer", **attributes),
    ]
    if ending.startswith("relu"):
        nodes.append(helper.make_node("Relu", ["r"], ["c"], name="relu"))
    if ending == "shared":
        nodes.append(helper.make_node("Neg", ["r"], ["negative"], name="other"))
    if ending == "relu float":
        nodes.append(helper.make_node("Neg", ["c"], ["y"], name="other"))
    elif ending != "float":
        nodes.append(helper.make_node("QuantizeLinear", ["c" if ending.startswith("relu") else "r", "ys", "yz"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "ys", "yz"], ["y"]))
    outputs = [value("y", [None] * rank), *([value("negative", [None] * rank)] if ending == "shared" else [])]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    return build(nodes, [value("x", [None] * rank)], outputs, tensors)


def scales(outputs: int, size: int) -> Array:
    return (np.linspace(0.5, 1.5, outputs) / 60 / np.sqrt(size / outputs)).astype(np.float32)


def clip_pairs(a: Array, w: Array) -> tuple[int, int, int]:
    """Pairs, overflowing pairs and the saturated sum of two vectors in the kernel's order; one pair at a time."""
    a, w = np.append(a, 0) if len(a) % 2 else a, np.append(w, 0) if len(w) % 2 else w
    sums = [int(a[k]) * int(w[k]) + int(a[k + 1]) * int(w[k + 1]) for k in range(0, len(a), 2)]
    return len(sums), sum(not -32768 <= s <= 32767 for s in sums), sum(min(32767, max(-32768, s)) for s in sums)


def convolve(
    x: Array, w: Array, *, group: int, strides: list[int], pads: list[int], dilations: list[int]
) -> tuple[Array, int, int]:
    """Saturated sums [N, M, H, W] of a 2-D convolution, its pairs and its overflows; loops only."""
    x = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])], constant_values=X_ZERO)
    reach = [(size - 1) * step + 1 for size, step in zip(w.shape[2:], dilations, strict=True)]
    height, width = ((x.shape[2 + i] - reach[i]) // strides[i] + 1 for i in (0, 1))
    sums = np.zeros((len(x), len(w), height, width), np.int64)
    pairs = overflowing = 0
    for n, m, i, j in np.ndindex(*sums.shape):
        first = m // (len(w) // group) * w.shape[1]
        rows = slice(i * strides[0], i * strides[0] + reach[0], dilations[0])
        columns = slice(j * strides[1], j * strides[1] + reach[1], dilations[1])
        a = x[n, first : first + w.shape[1], rows, columns].transpose(1, 2, 0).reshape(-1)
        count, over, sums[n, m, i, j] = clip_pairs(a, w[m].transpose(1, 2, 0).reshape(-1))
        pairs, overflowing = pairs + count, overflowing + over
    return sums, pairs, overflowing


def quantized(sums: Array, unit: Array, zero: int = 100) -> Array:
    return (np.clip(np.round(sums * unit / Y_SCALE) + zero, 0, 255) - zero) * Y_SCALE


CONVOLUTIONS = (
    ((2, 4, 5, 5), (6, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    ((2, 3, 6, 5), (5, 3, 3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ((1, 5, 6, 6), (4, 5, 2, 2), {"dilations": [2, 3]}),
    ((1, 6, 4, 4), (4, 3, 3, 3), {"group": 2}),
    ((1, 4, 4, 4), (8, 1, 3, 3), {"group": 4}),
)


@pytest.mark.parametrize(("x_shape", "w_shape", "given"), CONVOLUTIONS)
def test_convolution_matches_loops(x_shape, w_shape, given):
    data, weights = samples(x_shape), full_range(w_shape)
    model = single("Conv", 4, weights, **given)
    options = {"group": 1, "strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1]} | given
    sums, pairs, overflowing = convolve(stored_input(data), weights, **options)
    assert overflowing > 0

    (found,) = count_saturation(model, data)
    assert (found.pairs, found.overflowing) == (pairs, overflowing)
    assert (found.layer, found.op_type) == ("layer", "Conv")

    exact = sums - X_ZERO * weights.astype(np.int64).sum((1, 2, 3)).reshape(-1, 1, 1)
    expected = quantized(exact, np.float32(X_SCALE) * scales(len(weights), weights.size).reshape(-1, 1, 1))
    predicted = simulate_saturation(model, data, samples=len(data))["y"]
    assert np.abs(predicted - expected).max() <= 1.001 * Y_SCALE  # a tie may round to either side
    assert (np.abs(predicted - expected) > 0.01).mean() < 0.01


@pytest.mark.parametrize(
    ("kind", "shape", "attributes"),
    [
        ("MatMul", (2, 3, 9), {}),
        ("Gemm", (4, 10), {"alpha": 0.5}),
        ("Gemm", (4, 9), {"transB": 1}),
        ("Gemm", (8, 4), {"transA": 1}),
    ],
)
@pytest.mark.parametrize("ending", ["quantized", "float"])
def test_matrix_product_matches_loops(kind, shape, attributes, ending):
    data = samples(shape)
    x = stored_input(data)
    x = x.T if attributes.get("transA") else x
    weights = full_range((x.shape[-1], 12))
    model = single(kind, len(shape), weights.T.copy() if attributes.get("transB") else weights, ending=ending, **attributes)
    counted = [[clip_pairs(row, column) for column in weights.T] for row in x.reshape(-1, x.shape[-1])]
    pairs, overflowing, sums = (np.array([[cell[i] for cell in row] for row in counted]) for i in range(3))
    assert overflowing.sum() > 0

    if not attributes.get("transA"):  # there the samples are not the first axis of the product
        (found,) = count_saturation(model, data)
        assert (found.pairs, found.overflowing) == (pairs.sum(), overflowing.sum())

    exact = sums - X_ZERO * weights.astype(np.int64).sum(0)
    unit = np.float32(X_SCALE) * scales(12, weights.size) * attributes.get("alpha", 1.0)
    expected = exact * unit if ending == "float" else quantized(exact, unit)
    predicted = simulate_saturation(model, data, samples=len(data))["y"].reshape(expected.shape)
    np.testing.assert_allclose(predicted, expected, atol=1e-4)


def test_worst_sum_is_the_largest():
    weights = np.array([[127, 127, 3], [-127, -120, 0]], np.int8).T.copy()
    data = make_dataset({"x": np.array([[4.36, 4.36, 0.0], [4.36, 4.3, 9.0]], np.float32)}, source="here")
    (found,) = count_saturation(single("MatMul", 2, weights), data)
    assert (found.pairs, found.overflowing, found.worst) == (8, 4, 2 * 127 * 255)
    (found,) = count_saturation(single("MatMul", 2, -weights), data)
    assert (found.pairs, found.overflowing, found.worst) == (8, 4, 2 * 127 * 255)


def test_nothing_overflows_on_small_activations():
    data = make_dataset({"x": np.full((3, 16), 1.0, np.float32)}, source="here")
    (found,) = count_saturation(single("MatMul", 2, full_range((16, 8))), data)
    assert (found.pairs, found.overflowing) == (3 * 8 * 8, 0)
    assert found.worst <= 32767


def test_depthwise_convolution_does_not_saturate():
    data, model = samples((1, 16, 6, 6)), single("Conv", 4, full_range((16, 1, 3, 3)), group=16)
    assert count_saturation(model, data) == ()


@pytest.mark.parametrize(
    ("kind", "ending", "is_integer"),
    [
        ("Conv", "quantized", True),
        ("Conv", "relu", True),
        ("Conv", "relu inside", False),  # the quantizer reaches below 0: Relu stays, and the layer before it is float32
        ("Conv", "float", False),
        ("Conv", "shared", False),
        ("MatMul", "float", True),
        ("MatMul", "relu inside", False),
        ("MatMul", "relu float", False),
        ("MatMul", "shared", False),
    ],
)
def test_layer_saturates_only_where_the_runtime_uses_integers(kind, ending, is_integer):
    shape, weights = ((1, 6, 5, 5), full_range((8, 6, 3, 3))) if kind == "Conv" else ((3, 20), full_range((20, 8)))
    model, data = single(kind, len(shape), weights, ending=ending), samples(shape)
    assert bool(count_saturation(model, data)) == is_integer


def test_signed_activations_saturate_like_unsigned_ones():
    data, weights = samples((4, 30)), full_range((30, 16))
    unsigned, signed = (single("MatMul", 2, weights, zero=zero) for zero in (UNSIGNED, np.int8(X_ZERO - 128)))
    found = count_saturation(signed, data)
    assert found[0].overflowing > 0
    assert found == count_saturation(unsigned, data)


def test_rows_are_drawn_per_sample_with_the_seed():
    data, model = samples((5, 4, 12, 12)), single("Conv", 4, full_range((8, 4, 3, 3)))
    few = count_saturation(model, data, samples=3, rows=20, seed=4)
    assert few[0].pairs == 3 * 20 * 8 * 18
    assert few == count_saturation(model, data, samples=3, rows=20, seed=4)
    assert few != count_saturation(model, data, samples=3, rows=20, seed=5)


def test_odd_weights_end_with_a_pair_of_their_own():
    assert cannot_saturate(np.array([[1, 1, 127]], np.int8))
    assert cannot_saturate(np.array([[64, 64], [-64, -64]], np.int8))
    assert not cannot_saturate(np.array([[64, 65]], np.int8))
    assert not cannot_saturate(np.array([[0, 0], [-64, -65]], np.int8))
    assert cannot_saturate(np.array([[0, 127, 127, 0]], np.int8))  # neighbours, but of two pairs


def test_second_layer_sees_the_first_one_saturated():
    """Two layers and a skip: the second correction is computed from activations that the first one moved."""
    x, w1, w2 = samples((6, 24)), full_range((24, 24)), full_range((24, 24), seed=3)
    constants = {
        "xs": np.float32(X_SCALE),
        "xz": np.uint8(X_ZERO),
        "ws": np.float32(2e-3),
        "wz": np.int8(0),
        "w1": w1,
        "w2": w2,
    }
    constants |= {"hs": np.float32(X_SCALE), "hz": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w1", "ws", "wz"], ["w1d"]),
        helper.make_node("DequantizeLinear", ["w2", "ws", "wz"], ["w2d"]),
        helper.make_node("MatMul", ["xd", "w1d"], ["h"], name="first"),
        helper.make_node("QuantizeLinear", ["h", "hs", "hz"], ["hq"]),
        helper.make_node("DequantizeLinear", ["hq", "hs", "hz"], ["hd"]),
        helper.make_node("MatMul", ["hd", "w2d"], ["r"], name="second"),
        helper.make_node("Add", ["r", "hd"], ["y"], name="add"),
        helper.make_node("Neg", ["xd"], ["early"], name="early"),
    ]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    model = build(nodes, [value("x", ["n", 24])], [value("y", ["n", 24]), value("early", ["n", 24])], tensors)

    def saturated(a: Array, w: Array, zero: int) -> Array:
        return np.array([[clip_pairs(row, column)[2] for column in w.T] for row in a]) - zero * w.astype(np.int64).sum(0)

    stored = stored_input(x)
    hidden = np.clip(np.round(saturated(stored, w1, X_ZERO) * np.float32(2e-3)) + 128, 0, 255).astype(np.int64)
    expected = saturated(hidden, w2, 128) * X_SCALE * 2e-3 + (hidden - 128) * X_SCALE
    outputs = simulate_saturation(model, x, samples=len(x))
    np.testing.assert_allclose(outputs["y"], expected, atol=1e-4)
    np.testing.assert_allclose(outputs["early"], (X_ZERO - stored) * X_SCALE, atol=1e-6)


def test_layers_that_share_an_activation():
    data, weights = samples((3, 20)), full_range((20, 8))
    model = single("MatMul", 2, weights, ending="float")
    model.graph.node.append(helper.make_node("MatMul", ["xd", "wd"], ["again"], name="twin"))
    model.graph.output.append(value("again", [None, None]))
    outputs = simulate_saturation(model, data, samples=len(data))
    np.testing.assert_array_equal(outputs["y"], outputs["again"])
    counts = count_saturation(model, data)
    assert [item.layer for item in counts] == ["layer", "twin"]
    assert counts[0].overflowing == counts[1].overflowing > 0


def test_answers_of_an_emulated_haswell():
    """What ONNX Runtime 1.32 gave for this layer under qemu-x86_64 -cpu Haswell-noTSX; unsaturated it gives other values."""
    data, weights = samples((1, 3, 4, 4)), full_range((4, 3, 3, 3))
    predicted = simulate_saturation(single("Conv", 4, weights), data, samples=1)["y"]
    assert np.round(predicted / Y_SCALE).astype(int).reshape(-1).tolist() == EMULATED


EMULATED = [5, -11, 14, -21, 103, 59, 62, 74, -31, 38, 15, 97, -100, 13, -100, -84]
