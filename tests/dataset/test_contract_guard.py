"""The contract's reactions, and the file in which the owner states them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.dataset.contract import infer_contract
from edgekit.dataset.contract_file import lay_over, print_contract, read_contract_file
from edgekit.dataset.data import make_dataset
from edgekit.dataset.guarding import Guard, RefusedError, check_rules
from edgekit.dataset.load import load_dataset
from edgekit.errors import DataError, UsageError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.contract import ColumnSpec, Contract, InputSpec
from edgekit.schema.tensor import TensorSpec

NAN, INF = float("nan"), float("inf")
OUT = (TensorSpec(name="y", dtype="float32", shape=("batch", 3)),)


def contract(*columns, dtype="float32", shape=None, **rules):
    shape = shape or ("batch", len(columns) or 2)
    return Contract(inputs=(InputSpec(name="x", dtype=dtype, shape=shape, columns=columns, **rules),), outputs=OUT)


def apply(declared, rows, dtype=np.float32):
    given_rows = np.array(rows, dtype)
    before = given_rows.copy()
    guarded = Guard(declared).apply({"x": given_rows})
    assert np.array_equal(given_rows, before, equal_nan=given_rows.dtype.kind == "f"), "the caller's array was changed"
    return guarded


def test_right_feeds_are_handed_on_uncopied():
    feeds = {"x": np.array([[0.1, 0.2]], np.float32)}
    guarded = Guard(contract(minimum=0, maximum=1)).apply(feeds)
    assert guarded.feeds["x"] is feeds["x"]
    assert (guarded.verdicts, guarded.samples, guarded.out_of_range) == ((), 1, 0)


def test_contract_of_before_reacts_as_before():
    old = decode_json(
        b'{"inputs":[{"name":"x","dtype":"float32","shape":["batch",2],"minimum":-1.0,"maximum":1.0}],"outputs":[]}', Contract
    )
    guarded = apply(old, [[0, 5], [0, 0], [-9, 5]])
    assert np.array_equal(guarded.feeds["x"], np.array([[0, 5], [0, 0], [-9, 5]], np.float32))
    assert (guarded.samples, guarded.out_of_range) == (3, 2)
    assert [verdict.text for verdict in guarded.verdicts] == ["x: 2 out of range, passed"]
    for bad in (NAN, INF, -INF):
        with pytest.raises(DataError) as caught:
            apply(old, [[0, bad]])
        assert caught.value.code == "data.not_finite"


@pytest.mark.parametrize("shape", [("batch", 2), ("batch", 1, 2)])
def test_value_out_of_range_is_clipped(shape):
    guarded = apply(
        contract(minimum=-1, maximum=1, out_of_range="clip", shape=shape), np.reshape([[0, 5], [-7, INF]], [2, *shape[1:]])
    )
    assert guarded.feeds["x"].ravel().tolist() == [0, 1, -1, 1]
    assert [(verdict.action, verdict.count) for verdict in guarded.verdicts] == [("clip", 2)]


def test_value_out_of_range_is_rejected():
    with pytest.raises(RefusedError) as caught:
        apply(contract(ColumnSpec(name="a"), ColumnSpec(name="b", maximum=3, out_of_range="reject")), [[9, 1], [9, 4]])
    assert caught.value.code == "data.out_of_range"
    assert 'input "x", column "b": 1 value is outside' in caught.value.message
    assert [(verdict.name, verdict.action, verdict.count) for verdict in caught.value.verdicts] == [("x.b", "reject", 1)]


def test_missing_value_is_imputed_by_column():
    columns = (
        ColumnSpec(name="a", fill=0.5),
        ColumnSpec(name="b", fill=7, missing_value=-999),
        ColumnSpec(name="c", missing="pass"),
    )
    guarded = apply(
        contract(*columns, missing="impute", minimum=-1000, maximum=1000), [[NAN, 1, 2], [3, -999, NAN], [NAN, NAN, 4]]
    )
    assert np.array_equal(guarded.feeds["x"], np.array([[0.5, 1, 2], [3, 7, NAN], [0.5, 7, 4]], np.float32), equal_nan=True)
    assert [verdict.text for verdict in guarded.verdicts] == [
        "x.a: 2 missing, imputed",
        "x.b: 2 missing, imputed",
        "x.c: 1 missing, passed",
    ]


def test_declared_missing_value_is_rejected():
    with pytest.raises(RefusedError) as caught:
        apply(contract(missing_value=255, dtype="uint8"), [[1, 255]], np.uint8)
    assert caught.value.code == "data.missing_value"


@pytest.mark.parametrize(("unknown", "expected"), [("pass", [[5, 1]]), ("impute", [[0, 1]])])
@pytest.mark.parametrize("rows", [1, 40])
def test_unknown_category(unknown, expected, rows):
    declared = contract(ColumnSpec(name="a", categories=(0, 1, 2), unknown=unknown, fill=0), ColumnSpec(name="b"))
    guarded = apply(declared, [[5, 1]] * rows)
    assert guarded.feeds["x"].tolist() == expected * rows
    assert [(v.name, v.fault, v.count) for v in guarded.verdicts] == [("x.a", "unknown category", rows)]


def test_value_is_judged_once():
    column = ColumnSpec(name="a", categories=(0, 1), unknown="impute", fill=0, minimum=0, maximum=1, out_of_range="clip")
    guarded = apply(contract(column, ColumnSpec(name="b")), [[7, 1]])
    assert guarded.feeds["x"].tolist() == [[0, 1]]
    assert [verdict.text for verdict in guarded.verdicts] == ["x.a: 1 unknown category, imputed"]
    assert guarded.out_of_range == 0


def test_unknown_category_is_rejected():
    with pytest.raises(RefusedError) as caught:
        apply(contract(ColumnSpec(name="a", categories=(0, 1), unknown="reject"), ColumnSpec(name="b")), [[3, 1]])
    assert (caught.value.code, caught.value.verdicts[0].name) == ("data.unknown_category", "x.a")


def test_imputing_without_a_fill_refuses():
    with pytest.raises(RefusedError):
        apply(contract(missing="impute"), [[NAN, 1]])


def test_scalar_and_integer_inputs():
    scalar = Contract(inputs=(InputSpec(name="x", dtype="float32", shape=(), maximum=1, out_of_range="clip"),), outputs=())
    assert Guard(scalar).apply({"x": np.array(3, np.float32)}).feeds["x"] == 1
    whole = contract(dtype="int16", minimum=0.5, maximum=99.5, out_of_range="clip")
    assert apply(whole, [[0, 100]], np.int16).feeds["x"].tolist() == [[1, 99]]
    assert apply(contract(dtype="uint8", minimum=0, maximum=255), [[0, 255]], np.uint8).verdicts == ()


values = st.one_of(st.floats(-20, 20, width=32), st.just(NAN), st.just(-999.0))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(values, values), min_size=1, max_size=5),
    on_range=st.sampled_from(["clip", "pass"]),
    on_missing=st.sampled_from(["impute", "pass"]),
)
def test_reactions_of_a_value_are_those_of_the_declaration(rows, on_range, on_missing):
    """Against a plain loop over the values."""
    columns = (ColumnSpec(name="a", minimum=-5, maximum=5), ColumnSpec(name="b", minimum=0, maximum=10, missing_value=-999))
    declared = contract(*columns, out_of_range=on_range, missing=on_missing, fill=2)
    guarded = apply(declared, rows)
    expected, outside = [], 0
    for row in rows:
        new, is_outside = [], False
        for value, column in zip(row, columns, strict=True):
            if np.isnan(value) or value == column.missing_value:
                new.append(2.0 if on_missing == "impute" else value)
                continue
            is_out = value < column.minimum or value > column.maximum
            is_outside |= is_out
            new.append(min(max(value, column.minimum), column.maximum) if is_out and on_range == "clip" else value)
        expected.append(new)
        outside += is_outside
    assert np.array_equal(guarded.feeds["x"], np.array(expected, np.float32), equal_nan=True)
    assert guarded.out_of_range == outside
    again = Guard(declared).apply(guarded.feeds)
    assert on_range == "pass" or on_missing == "pass" or again.verdicts == (), "what was repaired is right"


@pytest.mark.parametrize(
    ("declared", "code"),
    [
        (contract(minimum=2, maximum=1), "contract.range"),
        (contract(out_of_range="clip"), "contract.range"),
        (contract(missing="impute"), "contract.fill"),
        (contract(ColumnSpec(name="a"), shape=("batch", 2)), "contract.columns"),
        (contract(ColumnSpec(name="a"), ColumnSpec(name="a")), "contract.columns"),
        (contract(missing="impute", fill=0.5, dtype="int8"), "contract.value"),
        (contract(categories=(300,), dtype="uint8"), "contract.value"),
    ],
)
def test_contradictory_contract(declared, code):
    with pytest.raises(UsageError) as caught:
        check_rules(declared)
    assert caught.value.code == code


# --- learned from data, and stated by hand ----------------------------------------------------------------------------------

CSV = "temperature,mode,label\n" + "\n".join(f"{20 + i % 7}.5,{i % 3},{i % 3}" for i in range(60)) + "\n,1,0\n"
X = (TensorSpec(name="x", dtype="float32", shape=("batch", 2)),)


@pytest.fixture
def learned(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(CSV)
    return infer_contract(load_dataset(str(path), X, is_missing_allowed=True), X, OUT)


def test_contract_learned_from_a_table(learned):
    temperature, mode = learned.inputs[0].columns
    assert (temperature.name, temperature.minimum, temperature.maximum) == ("temperature", 20.5, 26.5)
    assert temperature.missing_share == pytest.approx(1 / 61, abs=1e-6)
    assert (mode.name, mode.categories, temperature.categories) == ("mode", (0, 1, 2), ())
    assert learned.inputs[0].missing_share == pytest.approx(1 / 122, abs=1e-6)


def test_missing_values_stay_refused_where_nobody_asked_for_them(tmp_path):
    (tmp_path / "data.csv").write_text(CSV)
    with pytest.raises(DataError) as caught:
        load_dataset(str(tmp_path / "data.csv"), X)
    assert caught.value.code == "data.not_finite"


def test_columns_without_names_are_learned_when_asked():
    data = make_dataset({"x": np.zeros((5, 2), np.float32)}, source="test")
    assert infer_contract(data, X, OUT).inputs[0].columns == ()
    assert [column.name for column in infer_contract(data, X, OUT, is_each_column=True).inputs[0].columns] == ["0", "1"]


def test_contract_file_changes_what_it_names(learned, tmp_path):
    path = tmp_path / "contract.toml"
    path.write_text(
        'violation_share = 0.2\n[[inputs]]\nname = "x"\nout_of_range = "clip"\n'
        '[[inputs.columns]]\nname = "temperature"\nmaximum = 85\nmissing = "impute"\nfill = 21.5\n'
    )
    stated = lay_over(learned, read_contract_file(path))
    spec = stated.inputs[0]
    assert (stated.violation_share, spec.out_of_range, spec.missing) == (0.2, "clip", "reject")
    assert (spec.columns[0].minimum, spec.columns[0].maximum, spec.columns[0].fill) == (20.5, 85, 21.5)
    assert spec.columns[1] == learned.inputs[0].columns[1]
    assert decode_json(encode_json(stated), Contract) == stated


def test_printed_contract_reads_back(learned, tmp_path):
    path = tmp_path / "contract.toml"
    path.write_text(print_contract(learned))
    assert lay_over(learned, read_contract_file(path)) == learned
    bare = Contract(inputs=(InputSpec(name="x", dtype="float32", shape=("batch", 2)),), outputs=OUT)
    again = lay_over(bare, read_contract_file(path)).inputs[0]
    assert [column.name for column in again.columns] == ["temperature", "mode"]
    assert again.columns[1].categories == (0, 1, 2)


@pytest.mark.parametrize(
    ("text", "code", "word"),
    [
        ("[[inputs]]\nname = 'x'\nout_of_rnge = 'clip'\n", "contract.malformed", "out_of_rnge"),
        ("[[inputs]]\nname = 'x'\nmissing = 'clip'\n", "contract.malformed", "clip"),
        ("[[inputs]]\nname = 'y'\n", "contract.unknown_input", "y"),
        ("[[inputs]]\nname = 'x'\n[[inputs.columns]]\nname = 'temprature'\n", "contract.columns", "temprature"),
        ("[[inputs]]\nname = 'x'\nmissing = 'impute'\n", "contract.fill", "fill"),
        ("violation_share = 5\n", "contract.violation_share", "5"),
        ("[[inputs]\n", "contract.unreadable", "TOML"),
    ],
)
def test_contract_file_with_a_mistake(learned, tmp_path, text, code, word):
    path = tmp_path / "contract.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        lay_over(learned, read_contract_file(path))
    assert caught.value.code == code
    assert word in caught.value.message
