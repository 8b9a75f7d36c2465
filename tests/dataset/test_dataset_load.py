"""Loading: every source gives the same checked arrays, and every bad input is named."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from edgekit.dataset.load import load_dataset
from edgekit.errors import DataError, UsageError
from edgekit.schema.tensor import TensorSpec

X = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 1, 4, 6))
VALUES = np.array([[0.5, 1.25, -2.0], [3.0, 4.5, 5.0], [6.0, 7.0, 8.75], [9.0, 10.0, 11.0]], np.float32)
LABELS = np.array([0, 2, 1, 0])


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def code_of(spec, inputs, **named):
    with pytest.raises(UsageError) as caught:
        load_dataset(spec, inputs, **named)
    assert spec.rpartition("/")[2].split(":")[0] in caught.value.message
    return caught.value.code, caught.value


# --- npz --------------------------------------------------------------------------------------------------------------------


def test_npz_reads_inputs_and_labels(tmp_path):
    data = load_dataset(save(tmp_path / "d.npz", x=VALUES, labels=LABELS), [X])
    np.testing.assert_array_equal(data.inputs["x"], VALUES)
    assert data.labels.tolist() == LABELS.tolist()
    assert data.labels.dtype == np.int64
    assert data.notes == ()


def test_single_input_model_accepts_inputs(tmp_path):
    assert len(load_dataset(save(tmp_path / "d.npz", inputs=VALUES), [X])) == 4


def test_two_input_model_does_not_accept_inputs(tmp_path):
    other = TensorSpec(name="y", dtype="float32", shape=("batch", 3))
    assert code_of(save(tmp_path / "d.npz", inputs=VALUES, y=VALUES), [X, other])[0] == "data.missing_input"


def test_input_may_be_called_labels(tmp_path):
    spec = TensorSpec(name="labels", dtype="float32", shape=("batch", 3))
    data = load_dataset(save(tmp_path / "d.npz", labels=VALUES), [spec])
    assert data.labels is None


def test_class_names_in_npz(tmp_path):
    path = save(tmp_path / "d.npz", x=VALUES, labels=LABELS, class_names=np.array(["a", "b", "c"]))
    assert load_dataset(path, [X]).class_names == ("a", "b", "c")
    assert load_dataset(path, [X], class_names=("c", "b", "a")).labels.tolist() == [2, 0, 1, 2]


def test_missing_input_names_the_typo(tmp_path):
    code, error = code_of(save(tmp_path / "d.npz", imgae=VALUES), [TensorSpec(name="image", dtype="float32", shape=("b", 3))])
    assert code == "data.missing_input"
    assert error.hint == 'Rename the array "imgae" to "image".'


def test_missing_second_input_names_what_is_there_and_what_is_not(tmp_path):
    other = TensorSpec(name="meta", dtype="float32", shape=("batch", 3))
    code, error = code_of(save(tmp_path / "d.npz", x=VALUES), [X, other])
    assert code == "data.missing_input"
    assert "expected x, meta, found x." in error.message
    assert 'Name the array "meta"' in error.hint


def test_unknown_input_is_refused(tmp_path):
    code, error = code_of(save(tmp_path / "d.npz", x=VALUES, label=LABELS), [X])
    assert code == "data.unknown_input"
    assert '"labels"' in error.hint


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((5, 4, 6), "[:, None]"),
        ((5, 4, 6, 1), "transpose(0, 3, 1, 2)"),
        ((1, 4, 6), "array[None]"),
        ((5, 1, 4, 7), "Axis 0"),
        ((5,), "Axis 0"),
    ],
)
def test_wrong_shape(tmp_path, shape, hint):
    code, error = code_of(save(tmp_path / "d.npz", image=np.zeros(shape, np.float32)), [IMAGE])
    assert code == "data.shape"
    assert "[samples, 1, 4, 6]" in error.message
    assert hint in error.hint


def test_dynamic_axis_takes_any_size(tmp_path):
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", "time"))
    assert load_dataset(save(tmp_path / "d.npz", x=np.zeros((2, 17), np.float32)), [spec]).inputs["x"].shape == (2, 17)


def test_inputs_of_different_lengths(tmp_path):
    other = TensorSpec(name="y", dtype="float32", shape=("batch",))
    code, error = code_of(save(tmp_path / "d.npz", x=VALUES, y=np.zeros(3, np.float32)), [X, other])
    assert code == "data.shape"
    assert "3 samples" in error.message


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (VALUES.astype(np.float64), "float32"),
        (VALUES.astype(">f4"), "float32"),
        (VALUES.astype(np.int64), "float32"),
        (np.full((4, 3), 255, np.uint8), "float32"),
        (np.full((4, 3), 127, np.int64), "int8"),
        (np.full((4, 3), 2.0), "uint8"),
        (np.ones((4, 3), bool), "float32"),
    ],
)
def test_exact_casts_are_made(tmp_path, values, dtype):
    spec = TensorSpec(name="x", dtype=dtype, shape=("batch", 3))
    data = load_dataset(save(tmp_path / "d.npz", x=values), [spec])
    assert data.inputs["x"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(data.inputs["x"], values)
    assert bool(data.notes) == (values.dtype.newbyteorder("=") != np.dtype(dtype))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.full((4, 3), 0.5, np.float32), "int8"),
        (np.full((4, 3), 128), "int8"),
        (np.full((4, 3), -1), "uint8"),
        (np.full((4, 3), 2**24 + 1), "float32"),
        (np.full((4, 3), 1e39), "float32"),
        (np.full((4, 3), 1j), "float32"),
        (np.full((4, 3), "1.0"), "float32"),
        (np.full((4, 3), 2), "bool"),
        (np.full((4, 3), np.nan), "int32"),
    ],
)
def test_lossy_casts_are_refused(tmp_path, values, dtype):
    spec = TensorSpec(name="x", dtype=dtype, shape=("batch", 3))
    code, error = code_of(save(tmp_path / "d.npz", x=values), [spec])
    assert code == "data.dtype"
    assert dtype in error.message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_first_sample(tmp_path, value):
    values = VALUES.copy()
    values[2, 1] = values[3, 0] = value
    code, error = code_of(save(tmp_path / "d.npz", x=values), [X])
    assert code == "data.not_finite"
    assert "2 NaN" in error.message
    assert "sample 2" in error.message


def test_not_finite_beyond_the_first_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.dataset.fitting._CHUNK_VALUES", 6)
    values = VALUES.copy()
    values[3, 2] = np.nan
    assert "sample 3" in code_of(save(tmp_path / "d.npz", x=values), [X])[1].message


def test_no_samples(tmp_path):
    assert code_of(save(tmp_path / "d.npz", x=VALUES[:0]), [X])[0] == "data.empty"


@pytest.mark.parametrize("labels", [LABELS[:3], np.array(1)])
def test_labels_of_another_length(tmp_path, labels):
    code, error = code_of(save(tmp_path / "d.npz", x=VALUES, labels=labels), [X])
    assert code == "data.labels_length"
    assert "4 samples" in error.message


@pytest.mark.parametrize("labels", [np.full(4, 1j), np.array(["2020-01-01"] * 4, dtype="datetime64[D]")])
def test_labels_of_another_type(tmp_path, labels):
    assert code_of(save(tmp_path / "d.npz", x=VALUES, labels=labels), [X])[0] == "data.labels_dtype"


def test_labels_with_nan(tmp_path):
    assert code_of(save(tmp_path / "d.npz", x=VALUES, labels=np.array([0, 1, np.nan, 1])), [X])[0] == "data.not_finite"


def test_text_labels_are_matched_to_known_classes(tmp_path):
    path = save(tmp_path / "d.npz", x=VALUES, labels=np.array(["dog", "cat", "dog", "cat"]))
    assert load_dataset(path, [X]).class_names == ("cat", "dog")
    assert load_dataset(path, [X], class_names=("bird", "dog", "cat")).labels.tolist() == [1, 2, 1, 2]
    code, error = code_of(path, [X], class_names=("bird", "dgo", "cat"))
    assert code == "data.unknown_label"
    assert '"dgo"' in error.hint


def test_column_labels_become_flat(tmp_path):
    assert load_dataset(save(tmp_path / "d.npz", x=VALUES, labels=LABELS[:, None]), [X]).labels.shape == (4,)


class Planted:
    """Unpickling this leaves a trace."""

    hits = 0

    def __reduce__(self):
        return (Planted._hit, ())

    @staticmethod
    def _hit():
        Planted.hits += 1
        return 0


def test_pickled_objects_are_never_loaded(tmp_path):
    path = save(tmp_path / "d.npz", x=np.array([Planted()] * 4, dtype=object))
    code, error = code_of(path, [X])
    assert code == "data.unreadable"
    assert "pickled" in error.message
    (tmp_path / "p.npz").write_bytes(pickle.dumps(Planted()))
    assert code_of(str(tmp_path / "p.npz"), [X])[0] == "data.unreadable"
    assert Planted.hits == 0


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x93NUMPY\x01\x00"])
def test_damaged_npz(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    assert code_of(str(tmp_path / "d.npz"), [X])[0] == "data.unreadable"


def test_npz_with_flipped_bytes_is_never_a_crash(tmp_path):
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=VALUES, labels=LABELS)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            load_dataset(str(path), [X])
        except DataError:
            refused += 1
    assert refused > 10


def test_plain_array_is_no_npz(tmp_path):
    np.save(tmp_path / "d.npy", VALUES)
    (tmp_path / "d.npy").rename(tmp_path / "d.npz")
    assert code_of(str(tmp_path / "d.npz"), [X])[0] == "data.unreadable"


# --- what was given ---------------------------------------------------------------------------------------------------------


def test_missing_file_suggests_the_nearest(tmp_path):
    save(tmp_path / "calibration.npz", x=VALUES)
    code, error = code_of(str(tmp_path / "calibratoin.npz"), [X])
    assert code == "data.not_found"
    assert "calibration.npz" in error.hint


def test_unsupported_kind(tmp_path):
    (tmp_path / "d.txt").write_text("1 2 3")
    assert code_of(str(tmp_path / "d.txt"), [X])[0] == "data.unsupported"


def test_limit_is_spread_evenly(tmp_path):
    path = save(tmp_path / "d.npz", x=VALUES, labels=LABELS)
    data = load_dataset(path, [X], limit=2)
    np.testing.assert_array_equal(data.inputs["x"], VALUES[[0, 2]])
    assert data.labels.tolist() == [0, 1]
    assert data.digest == load_dataset(path, [X]).select([0, 2]).digest
    assert load_dataset(path, [X], limit=9).digest == load_dataset(path, [X]).digest
    with pytest.raises(UsageError, match="limit of 0"):
        load_dataset(path, [X], limit=0)


# --- tables -----------------------------------------------------------------------------------------------------------------


def csv_file(path, text):
    path.write_text(text)
    return str(path)


def test_csv_by_numeric_columns_equals_npz(tmp_path):
    rows = "\n".join(",".join(map(str, [*row, label])) for row, label in zip(VALUES.tolist(), LABELS, strict=True))
    path = csv_file(tmp_path / "d.csv", "a,b,c,label\n" + rows + "\n")
    npz = load_dataset(save(tmp_path / "d.npz", x=VALUES, labels=LABELS), [X])
    assert load_dataset(path, [X]).digest == npz.digest


def test_csv_names_the_column_that_is_not_numeric(tmp_path):
    code, error = code_of(csv_file(tmp_path / "d.csv", "a,b,c,label\n1,2,3,0\n1,oops,3,0\n"), [X])
    assert code == "data.missing_input"
    assert "2 of them numeric (b is not)" in error.message


def test_csv_numbered_columns_in_any_order_and_image_shape(tmp_path):
    spec = TensorSpec(name="p", dtype="float32", shape=("batch", 2, 2))
    path = csv_file(tmp_path / "d.csv", "p_3,p_0,p_1,id,p_2\n3,0,1,77,2\n")
    data = load_dataset(path, [spec])
    assert data.inputs["p"].tolist() == [[[0, 1], [2, 3]]]
    assert "columns left out: id" in data.notes


def test_csv_two_named_inputs(tmp_path):
    inputs = [
        TensorSpec(name="age", dtype="float32", shape=("batch", 1)),
        TensorSpec(name="zone", dtype="int64", shape=("batch",)),
    ]
    data = load_dataset(csv_file(tmp_path / "d.csv", "zone,age,labels\n4,31.5,yes\n5,32,no\n"), inputs)
    assert data.inputs["age"].tolist() == [[31.5], [32.0]]
    assert data.inputs["zone"].tolist() == [4, 5]
    assert data.class_names == ("no", "yes")
    assert data.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "data.empty"),
        ("a,b,c\n", "data.empty"),
        ("1,2,3\n4,5,6\n", "data.unreadable"),
        ("a,b,c\n1,2\n", "data.unreadable"),
        ("a,a,c\n1,2,3\n", "data.unreadable"),
        ("a,b,c\n1,,3\n", "data.not_finite"),
        ("a,b,c\n1,nan,3\n", "data.not_finite"),
        ("a,b\n1,2\n", "data.missing_input"),
        ("x_0,x_1,x_2\n1,red,3\n", "data.dtype"),
        ("x_0,x_1\n1,2\n", "data.shape"),
    ],
)
def test_bad_csv(tmp_path, text, code):
    assert code_of(csv_file(tmp_path / "d.csv", text), [X])[0] == code


def test_csv_that_is_not_text(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"a,b\n\xff\xfe\x00")
    assert code_of(str(tmp_path / "d.csv"), [X])[0] == "data.unreadable"


def test_parquet_equals_npz(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    npz = load_dataset(save(tmp_path / "d.npz", x=VALUES, labels=LABELS), [X])
    columns = {"x_0": VALUES[:, 0], "x_1": VALUES[:, 1], "x_2": VALUES[:, 2], "labels": LABELS}
    pq.write_table(pa.table(columns), tmp_path / "columns.parquet", row_group_size=2)
    pq.write_table(pa.table({"x": VALUES.tolist(), "labels": LABELS}), tmp_path / "lists.parquet")
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(VALUES.ravel()), 3)
    pq.write_table(pa.table({"x": fixed, "labels": LABELS}), tmp_path / "fixed.parquet")
    for name in ("columns", "lists", "fixed"):
        assert load_dataset(str(tmp_path / f"{name}.parquet"), [X]).digest == npz.digest, name


def test_bad_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "no.parquet").write_bytes(b"not parquet")
    assert code_of(str(tmp_path / "no.parquet"), [X])[0] == "data.unreadable"
    pq.write_table(pa.table({"x": [[1.0, 2.0, 3.0], [1.0, 2.0]]}), tmp_path / "ragged.parquet")
    assert code_of(str(tmp_path / "ragged.parquet"), [X])[0] == "data.shape"
    pq.write_table(pa.table({"x_0": [1, None], "x_1": [1, 2], "x_2": [1, 2]}), tmp_path / "null.parquet")
    assert code_of(str(tmp_path / "null.parquet"), [X])[0] == "data.not_finite"


# --- images -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def image_dir(tmp_path):
    root = tmp_path / "images"
    for label, (name, value) in enumerate([("ankle", 0), ("bag", 51), ("coat", 255)]):
        (root / name).mkdir(parents=True)
        for copy in range(label + 1):
            Image.new("RGB", (12, 8), (value, value, value)).save(root / name / f"{copy}.png")
    (root / "empty").mkdir()
    return root


def test_image_folder_by_class(image_dir):
    data = load_dataset(str(image_dir), [IMAGE])
    assert data.class_names == ("ankle", "bag", "coat", "empty")
    assert data.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert data.inputs["image"].shape == (6, 1, 4, 6)
    np.testing.assert_allclose(data.inputs["image"][:, 0, 0, 0], np.float32([0, 51, 51, 255, 255, 255]) / 255)


def test_image_folder_labels_follow_the_models_classes(image_dir):
    classes = ("coat", "empty", "bag", "ankle")
    assert load_dataset(str(image_dir), [IMAGE], class_names=classes).labels.tolist() == [3, 2, 2, 0, 0, 0]


def test_images_channels_last_and_uint8(image_dir):
    Image.new("RGB", (6, 4), (10, 20, 30)).save(image_dir / "ankle" / "0.png")
    last = TensorSpec(name="image", dtype="uint8", shape=(1, 4, 6, 3))
    first = TensorSpec(name="image", dtype="float32", shape=("n", 3, 4, 6))
    flat = TensorSpec(name="image", dtype="float32", shape=("n", 4, 6))
    assert load_dataset(str(image_dir), [last]).inputs["image"][0, 0, 0].tolist() == [10, 20, 30]
    np.testing.assert_allclose(
        load_dataset(str(image_dir), [first]).inputs["image"][0, :, 3, 5], np.float32([10, 20, 30]) / 255
    )
    assert load_dataset(str(image_dir), [flat]).inputs["image"].shape == (6, 4, 6)


def test_images_flat_folder_has_no_labels(image_dir):
    data = load_dataset(str(image_dir / "coat"), [IMAGE])
    assert data.labels is None
    assert len(data) == 3


def test_images_limit_reads_that_many(image_dir):
    data = load_dataset(str(image_dir), [IMAGE], limit=3)
    assert data.labels.tolist() == [0, 1, 2]
    assert data.digest == load_dataset(str(image_dir), [IMAGE]).select([0, 2, 4]).digest


def test_image_turned_upright_by_exif(tmp_path):
    image = Image.new("L", (4, 6), 0)
    image.paste(255, (0, 0, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = load_dataset(str(tmp_path), [IMAGE]).inputs["image"][0, 0]
    assert pixels[0].tolist() == [0, 0, 0, 1, 1, 1]


def test_bad_image_folders(image_dir, tmp_path):
    (tmp_path / "none").mkdir()
    assert code_of(str(tmp_path / "none"), [IMAGE])[0] == "data.empty"
    assert code_of(str(image_dir), [X])[0] == "data.shape"
    assert code_of(str(image_dir), [IMAGE, X])[0] == "data.missing_input"
    assert code_of(str(image_dir), [TensorSpec(name="i", dtype="int64", shape=("b", 1, 4, 6))])[0] == "data.dtype"
    Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(tmp_path / "none" / "deep.png")
    with pytest.raises(DataError, match="8 bits per channel"):
        load_dataset(str(tmp_path / "none"), [IMAGE])
    (image_dir / "bag" / "1.png").write_bytes(b"\x89PNG no")
    with pytest.raises(DataError, match=r"1\.png: sample 2 is not a readable image"):
        load_dataset(str(image_dir), [IMAGE])
    Image.new("L", (2, 2)).save(image_dir / "loose.png")
    assert code_of(str(image_dir), [IMAGE])[0] == "data.mixed_folder"


# --- functions --------------------------------------------------------------------------------------------------------------

MODULE = """
import numpy as np
from neighbour import VALUES, LABELS
def mapping(): return {"x": VALUES, "labels": LABELS}
def pair(): return VALUES, LABELS
def named_pair(): return {"x": VALUES}, LABELS
def bare(): return VALUES
def batches():
    for i in range(0, 4, 2): yield VALUES[i:i+2], LABELS[i:i+2]
def lists(): return [[VALUES[:1], LABELS[:1]], [VALUES[1:], LABELS[1:]]]
def rows(): return ({"x": VALUES[i:i+1], "labels": LABELS[i:i+1]} for i in range(4))
def lazy():
    import neighbour
    return neighbour.VALUES
def wrong(): return 3
def nothing(): return []
def fails(): raise RuntimeError("disk on fire")
def ragged(): return [VALUES, VALUES[:, :2]]
def uneven(): return [{"x": VALUES}, {"y": VALUES}]
value = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "neighbour.py").write_text(
        f"import numpy as np\nVALUES=np.array({VALUES.tolist()})\nLABELS=np.array({LABELS.tolist()})\n"
    )
    (tmp_path / "own_data.py").write_text(MODULE)
    yield tmp_path / "own_data.py"
    import sys

    for name in ("neighbour", "own_data", "edgekit_user_own_data"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["mapping", "pair", "named_pair", "batches", "lists", "rows"])
def test_function_in_every_form_equals_npz(module, tmp_path, name):
    npz = load_dataset(save(tmp_path / "d.npz", x=VALUES, labels=LABELS), [X])
    assert load_dataset(f"{module}:{name}", [X]).digest == npz.digest


@pytest.mark.parametrize("name", ["bare", "lazy"])
def test_function_without_labels(module, name):
    assert load_dataset(f"{module}:{name}", [X]).labels is None


def test_function_by_module_name_from_the_working_folder(module, monkeypatch):
    monkeypatch.chdir(module.parent)
    assert len(load_dataset("own_data:pair", [X])) == 4
    assert code_of("own_data:piar", [X])[0] == "data.not_found"
    assert code_of("no_such_module_here:pair", [X])[0] == "data.not_found"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("wrong", "data.unreadable"),
        ("nothing", "data.empty"),
        ("fails", "data.function_failed"),
        ("ragged", "data.shape"),
        ("uneven", "data.unreadable"),
        ("value", "data.not_found"),
        ("absent", "data.not_found"),
    ],
)
def test_bad_function(module, name, code):
    assert code_of(f"{module}:{name}", [X])[0] == code


def test_function_file_that_is_missing_or_does_not_import(tmp_path):
    assert code_of(f"{tmp_path}/absent.py:f", [X])[0] == "data.not_found"
    (tmp_path / "broken.py").write_text("import not_installed_anywhere")
    assert code_of(f"{tmp_path}/broken.py:f", [X])[0] == "data.function_failed"
    (tmp_path / "broken.py").write_text("def f(:")
    assert code_of(f"{tmp_path}/broken.py:f", [X])[0] == "data.function_failed"


def test_import_path_is_left_as_it_was(module):
    import sys

    before = list(sys.path)
    load_dataset(f"{module}:pair", [X])
    assert sys.path == before
