"""Which nodes run in int8: the fastest choice whose noise stays within a limit, as a mixed-integer program in milliseconds.

Variables: ``x`` per node (1 is int8); per tensor ``q`` (float32 comes in, an int8 node reads it), ``d`` (an int8 node makes it,
a float32 node reads it) and ``z`` (it is rounded to 8 bits, so that its noise counts). The objective is the time of all nodes
and conversions. Noise powers of single roundings add up (they are small and nearly independent), which the simulator checks
for the choice that comes out. Solved with HiGHS (Huangfu and Hall, 2018) through scipy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgekit.compiler.costs import Costs
from edgekit.compiler.qdq import FLOAT_ANSWERING
from edgekit.compiler.simulate import Unit

if TYPE_CHECKING:
    from onnx import ModelProto

TIME_LIMIT_S = 10.0
MIN_SAVING_MS = 1e-4
"""Each int8 node costs this much more: what saves nothing stays float32."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Nodes in int8, the milliseconds saved against float32 as predicted, and the predicted noise-to-signal ratio."""

    int8: frozenset[str]
    saved_ms: float
    noise: float


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """Which units make and read each tensor; ``is_read_outside`` where something that is no unit reads it too."""

    makers: dict[str, str]
    readers: dict[str, tuple[str, ...]]
    is_read_outside: frozenset[str]


def wire(proto: ModelProto, units: Mapping[str, Unit]) -> Wiring:
    """Follow the tensors of the float32 model; a Relu or Clip behind a unit belongs to it."""
    made: dict[str, str] = {}
    for node in proto.graph.node:
        if node.name in units:
            made.update(dict.fromkeys(node.output, node.name))
        elif node.op_type in ("Relu", "Clip") and node.input[0] in made:
            made.update(dict.fromkeys(node.output, made[node.input[0]]))
    tensors = {name for unit in units.values() for name in unit.activations}
    readers: dict[str, list[str]] = {name: [] for name in tensors}
    outside = {item.name for item in proto.graph.output} & tensors
    for node in proto.graph.node:
        for name in node.input:
            if name not in tensors:
                continue
            if node.name in units:
                readers[name].append(node.name)
            else:
                outside.add(name)
    return Wiring(
        makers={name: made[name] for name in tensors if name in made},
        readers={name: tuple(dict.fromkeys(value)) for name, value in readers.items()},
        is_read_outside=frozenset(outside),
    )


def choose(
    units: Mapping[str, Unit],
    wiring: Wiring,
    costs: Costs,
    noise: Mapping[str, float],
    *,
    limit: float = float("inf"),
    fixed_float: Collection[str] = (),
) -> Choice:
    """The fastest choice with a predicted noise-to-signal ratio of at most ``limit``.

    Args:
        units: quantizable nodes.
        wiring: who makes and reads each tensor.
        costs: milliseconds of nodes and conversions.
        noise: noise-to-signal ratio at the output of each switch alone.
        limit: of the sum of the noise.
        fixed_float: nodes that stay float32 whatever they cost.
    """
    program = _Program(units, wiring, costs, noise)
    return program.solve(limit, fixed_float)


class _Program:
    """The columns and rows of one model; only the limit changes between solutions."""

    def __init__(self, units: Mapping[str, Unit], wiring: Wiring, costs: Costs, noise: Mapping[str, float]) -> None:
        self._names = list(units)
        self._place = {("x", name): i for i, name in enumerate(self._names)}
        for kind in "qdz":
            for name in wiring.readers:
                self._place[kind, name] = len(self._place)
        self._cost = np.zeros(len(self._place))
        self._power = np.zeros(len(self._place))
        self._rows: list[dict[int, float]] = []
        for name in self._names:
            item = costs.units[name]
            self._cost[self._place["x", name]] = item.int8_ms - item.float_ms + MIN_SAVING_MS
            self._power[self._place["x", name]] = sum(noise.get(switch, 0.0) for switch in units[name].weights)
        for tensor in wiring.readers:
            q, d, z = (self._place[kind, tensor] for kind in "qdz")
            self._cost[q], self._cost[d], self._power[z] = costs.into[tensor], costs.back[tensor], noise.get(tensor, 0.0)
            maker = wiring.makers.get(tensor)
            has_float_answer = maker is not None and units[maker].op_type in FLOAT_ANSWERING
            own = self._place["x", maker] if maker is not None else None
            self._connect(tensor, wiring, own, has_float_answer=has_float_answer)

    def _connect(self, tensor: str, wiring: Wiring, own: int | None, *, has_float_answer: bool) -> None:
        """Q >= reader - maker; z >= reader; d >= maker - reader; z >= maker, unless the maker can answer in float32."""
        q, d, z = (self._place[kind, tensor] for kind in "qdz")
        is_bound = own is not None and not has_float_answer
        for reader in (self._place["x", name] for name in wiring.readers[tensor]):
            self._rows.append({q: 1.0, reader: -1.0, **({own: 1.0} if own is not None else {})})
            self._rows.append({z: 1.0, reader: -1.0})
            if is_bound and own is not None:
                self._rows.append({d: 1.0, own: -1.0, reader: 1.0})
        if is_bound and own is not None:
            self._rows.append({z: 1.0, own: -1.0})
            if tensor in wiring.is_read_outside:
                self._rows.append({d: 1.0, own: -1.0})

    def solve(self, limit: float, fixed_float: Collection[str]) -> Choice:
        """The best choice within the limit; nothing in int8 where the solver finds none."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        matrix = np.zeros((len(self._rows) + 1, len(self._place)))
        for index, row in enumerate(self._rows):
            for column, value in row.items():
                matrix[index, column] += value
        is_limited = bool(np.isfinite(limit)) and limit > 0
        matrix[-1] = self._power / (limit if is_limited else max(1e-12, float(self._power.sum())))
        low = np.concatenate([np.zeros(len(self._rows)), [-np.inf]])
        high = np.concatenate([np.full(len(self._rows), np.inf), [1.0 if is_limited else np.inf]])
        upper = np.ones(len(self._place))
        for name in fixed_float:
            if ("x", name) in self._place:
                upper[self._place["x", name]] = 0.0
        integral = np.zeros(len(self._place))
        integral[: len(self._names)] = 1
        answer = milp(
            self._cost,
            constraints=LinearConstraint(matrix, low, high),
            bounds=Bounds(0, upper),
            integrality=integral,
            options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": 1e-3},
        )
        if answer.x is None:
            return Choice(int8=frozenset(), saved_ms=0.0, noise=0.0)
        chosen = frozenset(name for name in self._names if answer.x[self._place["x", name]] > 0.5)
        return Choice(int8=chosen, saved_ms=-float(answer.fun), noise=float(self._power @ answer.x))
