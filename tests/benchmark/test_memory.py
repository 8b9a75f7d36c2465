"""Peak memory in a child process."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from edgekit.benchmark import memory
from edgekit.benchmark.memory import measure_peak_rss, own_peak_rss_mb
from edgekit.errors import ArtifactError


def write_constant(path, megabytes: int) -> None:
    """A model that holds so many megabytes of weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.random.default_rng(0).random((megabytes * 250_000,), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "heavy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_larger_model_needs_more_memory(tmp_path):
    peaks = []
    for megabytes in (1, 60):
        path = tmp_path / f"{megabytes}.onnx"
        write_constant(path, megabytes)
        peaks.append(measure_peak_rss(path, {"x": np.ones(1, np.float32)}))
    assert peaks[1] - peaks[0] > 60


def test_parents_memory_is_not_counted(sample_dir):
    """What getrusage gets wrong: the child starts from nothing, however large its parent is."""
    ballast = np.ones(50_000_000)  # 400 MB, written to
    peak = measure_peak_rss(sample_dir / "model.onnx", {"image": np.zeros((1, 1, 28, 28), np.float32)})
    assert own_peak_rss_mb() > 400
    assert 20 < peak < 300
    assert ballast[0] == 1


def test_error_of_the_child_is_raised_here(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ArtifactError) as caught:
        measure_peak_rss(path, {})
    assert caught.value.code == "model.unloadable"


def _crash(*_arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(*_arguments):
    signal.pause()


@pytest.mark.parametrize("ending", [_crash, _hang])
def test_child_that_crashes_or_hangs_gives_no_figure(monkeypatch, tmp_path, ending):
    monkeypatch.setattr(memory, "_run_child", ending)
    assert measure_peak_rss(tmp_path / "any.onnx", {}, timeout=5.0 if ending is _crash else 1.0) is None
