"""What declarations may say, and features of requests: tables and images."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import DataError, UsageError
from edgekit.evaluation.feature_parity import draw_columns, make_golden_features, prove_features
from edgekit.features.compute import compute
from edgekit.features.declaration import read_declaration
from edgekit.features.program import Program
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.features import FeatureSet, ImageFeatures, TableColumn, TableFeatures
from edgekit.schema.manifest import GoldenSet
from tests.features.declared import audio, vibration

TABLE = FeatureSet(
    inputs=(
        TableFeatures(
            name="x",
            columns=(
                TableColumn(name="power", steps=("log1p", "normalize(2, 0.5)", "clip(-4, 4)")),
                TableColumn(name="mode", steps=("one_hot(idle, run, stop)",)),
                TableColumn(name="code", steps=("codes(3, 1, 2)", "scale(0.5)")),
                TableColumn(name="age", steps=("offset(-10)", "abs")),
            ),
        ),
    )
)
IMAGE = FeatureSet(
    inputs=(
        ImageFeatures(name="image", raw="photo", height=4, width=6, channels=3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.25)),
    )
)
GOOD = {
    "stream": {"name": "motor", "rate_hz": 100, "columns": [{"name": "ax"}]},
    "windows": [{"name": "w", "length": 10}],
    "inputs": [{"kind": "windows", "name": "x", "parts": [{"window": "w", "aggregates": ["mean"]}]}],
}


def declare(**changes):
    return msgspec.convert(GOOD | changes, FeatureSet)


def part(*aggregates, **more):
    return [{"kind": "windows", "name": "x", "parts": [{"window": "w", "aggregates": list(aggregates)} | more]}]


def window(**fields):
    return [{"name": "w"} | fields]


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"inputs": part("men")}, "features.call", 'Did you mean "mean"'),
        ({"inputs": part("quantile")}, "features.call", "0 arguments, expected 1"),
        ({"inputs": part("quantile(2)")}, "features.call", "between 0 and 1"),
        ({"inputs": part("energy(10, 60)")}, "features.call", "50 Hz"),
        ({"inputs": part("mean", steps=["clip(1, 0)"])}, "features.call", "low before high"),
        ({"inputs": part("mean", steps=["one_hot(a)"])}, "features.call", "no such step"),
        ({"inputs": part("mean", "mean")}, "features.twice", "w.ax.mean"),
        ({"inputs": part("mean", columns=["az"])}, "features.column", "az"),
        ({"inputs": part("mean", window="v")}, "features.window", '"v"'),
        ({"inputs": []}, "features.empty", "no input"),
        ({"inputs": [*part("mean"), {"kind": "table", "name": "y", "columns": [{"name": "a"}]}]}, "features.mixed", "request"),
        ({"stream": None}, "features.stream", "no [stream]"),
        ({"stream": {"name": "m", "rate_hz": 0, "columns": [{"name": "ax"}]}}, "features.stream", "rate_hz"),
        ({"windows": window()}, "features.window", "no length"),
        ({"windows": window(length=5, length_s=1)}, "features.window", "in seconds"),
        ({"windows": window(length_s=0.123456)}, "features.window", "no whole number"),
        ({"windows": window(length=0)}, "features.window", "at least 1"),
        ({"windows": window(length=10**7)}, "features.window", "values"),
        ({"windows": [*window(length=5), {"name": "v", "length": 6}]}, "features.window", "hops of different lengths"),
        ({"windows": window(length=8, max_missing=0.5), "inputs": part("energy(0, 10)")}, "features.window", "every sample"),
        ({"inputs": [part("mean")[0] | {"mean": [0, 0], "std": [1, 1]}]}, "features.normalize", "2 means"),
        ({"inputs": [part("mean")[0] | {"dtype": "int8"}]}, "features.dtype", "int8"),
    ],
)
def test_declaration_that_does_not_fit_together(changes, code, word):
    with pytest.raises(UsageError) as caught:
        Program(declare(**changes))
    assert caught.value.code == code
    assert word in caught.value.message + caught.value.hint


def test_declaration_with_a_typing_error(tmp_path):
    path = tmp_path / "features.toml"
    path.write_text('[[inputs]]\nkind = "table"\nname = "x"\ncolumns = [{nme = "a", name = "b"}]\n')
    with pytest.raises(UsageError) as caught:
        read_declaration(path)
    assert (caught.value.code, 'no field "nme"' in caught.value.message) == ("features.malformed", True)
    path.write_text('[[inputs]]\nkind = "tables"\n')
    with pytest.raises(UsageError, match="tables"):
        read_declaration(path)


@pytest.mark.parametrize("declared", [vibration(), audio(), TABLE, IMAGE], ids=["stream", "audio", "table", "image"])
def test_declaration_survives_the_manifest(declared):
    assert decode_json(encode_json(declared), FeatureSet) == declared


def table(**changes):
    return {
        "power": np.array([0.0, 6.0, 1e9]),
        "mode": np.array(["run", "odd", "idle"], dtype=object),
        "code": np.array([1, 3, 9]),
        "age": np.array([4.0, 10.0, 11.5]),
    } | changes


def test_columns_become_the_tensor_in_their_order():
    program = Program(TABLE)
    assert program.names["x"] == ("power", "mode=idle", "mode=run", "mode=stop", "code", "age")
    made = compute(table(), program).inputs["x"]
    expected = [
        [(np.log1p(0) - 2) / 0.5, 0, 1, 0, 0.5, 6],
        [(np.log1p(6.0) - 2) / 0.5, 0, 0, 0, 0, 0],
        [4, 1, 0, 0, np.nan, 1.5],
    ]
    assert made.dtype == np.float32
    assert np.array_equal(made, _clipped(expected), equal_nan=True)


def _clipped(rows):
    made = np.array(rows)
    made[:, 0] = made[:, 0].clip(-4, 4)
    return made.astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(power=st.lists(st.floats(-0.9, 1e12), min_size=1, max_size=40), start=st.integers(0, 39), size=st.integers(1, 40))
def test_rows_do_not_depend_on_their_neighbours(power, start, size):
    count = len(power)
    columns = {
        "power": np.array(power),
        "mode": np.array((["idle", "stop"] * count)[:count], dtype=object),
        "code": np.arange(count) % 4,
        "age": np.arange(count) * 1.1,
    }
    whole = compute(columns, TABLE).inputs["x"]
    some = (
        compute({name: array[start : start + size] for name, array in columns.items()}, TABLE).inputs["x"]
        if start < count
        else whole[:0]
    )
    assert some.tobytes() == whole[start : start + size].tobytes()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"power": np.array(["a"] * 3, dtype=object)}, "data.dtype"),
        ({"mode": np.array([1, 2, 3])}, "data.dtype"),
        ({"age": np.zeros((3, 2))}, "data.shape"),
        ({"age": np.zeros(2)}, "data.shape"),
    ],
)
def test_columns_that_do_not_fit(changes, code):
    with pytest.raises(DataError) as caught:
        compute(table(**changes), TABLE)
    assert caught.value.code == code


def test_image_is_scaled_normalized_and_turned():
    photo = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    made = compute({"photo": photo}, IMAGE).inputs["image"]
    expected = ((photo / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.2, 0.25]).transpose(0, 3, 1, 2)
    assert made.shape == (2, 3, 4, 6)
    assert np.allclose(made, expected, atol=1e-6)
    assert compute({"photo": photo[1:]}, IMAGE).inputs["image"].tobytes() == made[1:].tobytes()
    with pytest.raises(DataError):
        compute({"photo": photo.astype(np.float32)}, IMAGE)


@pytest.mark.parametrize("declared", [vibration(), audio(), TABLE, IMAGE], ids=["stream", "audio", "table", "image"])
def test_golden_features_prove_themselves(declared):
    program = Program(declared)

    def run(feeds):
        return {"y": np.array([[float(np.nansum(array)) for array in feeds.values()]], np.float32)}

    made = make_golden_features(program, draw_columns(program), run, source="drawn")
    golden = GoldenSet(samples=(), atol=1e-5, rtol=0, features=made)
    assert prove_features(declared, golden, run).worst_error == 0
    assert prove_features(declared, golden, run).samples >= 4
