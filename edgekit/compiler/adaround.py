"""AdaRound: learn for each weight whether to round up or down, so that the layer's output changes least.

After Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020. The layer-wise loss is the squared
error of the layer's output on its inputs as the quantized network makes them, here through the inputs' Gram matrix, which gives
the same gradients without the inputs. The network's own error in these inputs is not made up for.

    >>> integers = learn_rounding(weights, steps, gram, 127)            # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ITERATIONS = 1000
WARM_UP = 0.2
"""Share of the iterations before the weights are pushed towards whole numbers."""
RATE = 5e-2
PUSH = 0.5
BETA = (20.0, 2.0)
STRETCH = (-0.1, 1.1)
MOMENTS = (0.9, 0.999)


def learn_rounding(weights: Array, steps: Array, gram: Array, limit: int) -> Array:
    """Integers of least output error.

    Args:
        weights: float [groups, outputs, k].
        steps: of the integers, the same shape.
        gram: X^T X of the inputs [groups, k, k].
        limit: the largest integer.
    """
    scaled = (weights / steps).astype(np.float32)
    low = np.floor(scaled)
    size = steps.astype(np.float32)
    scale = np.maximum(np.trace(gram, axis1=1, axis2=2) / gram.shape[1], 1e-12)[:, None, None]
    metric = (gram / scale).astype(np.float32)
    largest = np.maximum(size.max(axis=2, keepdims=True), 1e-12)
    unit = size / largest  # every output row counts alike
    share = np.clip(scaled - low, 0.01, 0.99)
    raw = np.log((share - STRETCH[0]) / (STRETCH[1] - share))
    first, second = np.zeros_like(raw), np.zeros_like(raw)
    for index in range(ITERATIONS):
        sigmoid = 1 / (1 + np.exp(-raw))
        stretched = sigmoid * (STRETCH[1] - STRETCH[0]) + STRETCH[0]
        up = np.clip(stretched, 0.0, 1.0)
        error = (np.clip(low + up, -limit, limit) - scaled) * unit
        gradient = 2 * np.matmul(error, metric) * unit
        done = index / ITERATIONS
        if done >= WARM_UP:
            cosine = np.cos(np.pi * (done - WARM_UP) / (1 - WARM_UP))
            beta = BETA[1] + 0.5 * (BETA[0] - BETA[1]) * (1 + cosine)
            distance = 2 * up - 1
            gradient -= PUSH * 2 * beta * np.sign(distance) * np.abs(distance) ** (beta - 1)
        inside = (stretched > 0) & (stretched < 1)
        gradient *= inside * sigmoid * (1 - sigmoid) * (STRETCH[1] - STRETCH[0])
        first = MOMENTS[0] * first + (1 - MOMENTS[0]) * gradient
        second = MOMENTS[1] * second + (1 - MOMENTS[1]) * gradient**2
        rate = RATE * np.sqrt(1 - MOMENTS[1] ** (index + 1)) / (1 - MOMENTS[0] ** (index + 1))
        raw -= rate * first / (np.sqrt(second) + 1e-8)
    return np.asarray(np.clip(low + (raw >= 0), -limit, limit), dtype=np.float64)


def output_error(integers: Array, weights: Array, steps: Array, gram: Array) -> float:
    """Squared error of the layer's output, summed over the inputs that ``gram`` was made of."""
    error = integers * steps - weights
    return float(np.einsum("goi,gij,goj->", error, gram, error, optimize=True))
