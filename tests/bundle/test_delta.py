"""Deltas: every pair gives back the same bytes, in bounded memory; anything else is refused with an error of ours."""

from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc

import hdiffpatch
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.delta import make, rans
from edgekit.bundle.delta.apply import apply_delta
from edgekit.bundle.delta.flat import find_flat_tensors
from edgekit.bundle.delta.layout import MAGIC, PREFIX, Header, Kind, Region, _Columns, encode_header, pack, parse_header
from edgekit.bundle.delta.make import make_delta, subtract
from edgekit.bundle.delta.rans import Decoder, encode, make_tables
from edgekit.bundle.delta.rows import MISSING, match_rows, runs
from edgekit.bundle.delta.tensors import find_tensors
from edgekit.errors import ArtifactError, DeviceError, EdgekitError, TrustError
from edgekit.schema.digest import digest_bytes
from edgekit.schema.release import DeltaRef


def quantized_net(
    seed=0, *, noise=0.0, layers=4, width=96, order=None, producer="edgekit", keep_scales=False, wide_scales=True
):
    """A chain of dequantized int8 matrices with float32 biases, as a quantizer writes it."""
    base, drift = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    nodes, tensors, at = [], [], "x"
    for i in range(layers):
        weight = base.standard_t(4, size=(width, width)).astype(np.float32)
        scale = np.abs(weight).max(axis=0) / 127
        weight = weight + (noise * drift.normal(size=weight.shape)).astype(np.float32)
        scale = (scale if keep_scales else np.abs(weight).max(axis=0) / 127).astype(np.float32)
        quantized = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
        bias = (base.normal(size=width) + noise * drift.normal(size=width)).astype(np.float32)
        tensors += [
            numpy_helper.from_array(quantized, f"w{i}"),
            helper.make_tensor(f"s{i}", TensorProto.FLOAT, [width], scale)
            if wide_scales
            else numpy_helper.from_array(scale, f"s{i}"),
            numpy_helper.from_array(bias, f"b{i}"),
        ]
        nodes.append(helper.make_node("DequantizeLinear", [f"w{i}", f"s{i}"], [f"d{i}"], axis=1))
        nodes.append(helper.make_node("Gemm", [at, f"d{i}", f"b{i}"], [f"y{i}"]))
        at = f"y{i}"
    if order is not None:
        tensors = [tensors[i] for i in np.random.default_rng(order).permutation(len(tensors))]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])  # noqa: E731
    graph = helper.make_graph(nodes, "chain", [value("x")], [value(at)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, producer_name=producer)
    return model.SerializeToString()


def ref_of(old, new, delta, codec="tsub1"):
    return DeltaRef(
        base=digest_bytes(old), target=digest_bytes(new), digest=digest_bytes(delta), size_bytes=len(delta), codec=codec
    )


def applied(tmp_path, old, new, delta, *, codec="tsub1", size=None):
    base = tmp_path / "base"
    base.write_bytes(old)
    out = io.BytesIO()
    size = len(new) if size is None else size
    apply_delta(io.BytesIO(delta), base, out, ref=ref_of(old, new, delta, codec), size_bytes=size)
    return out.getvalue()


PAIRS = {
    "same": ({}, {}),
    "fine-tuned": ({}, {"noise": 0.05}),
    "fine-tuned, scales kept": ({}, {"noise": 0.05, "keep_scales": True}),
    "reordered": ({}, {"order": 3}),
    "reordered and fine-tuned": ({"order": 1}, {"order": 3, "noise": 0.02}),
    "longer producer": ({}, {"producer": "edgekit, on another day"}),
    "other width": ({}, {"width": 80}),
    "one layer more": ({}, {"layers": 5}),
    "raw scales": ({"wide_scales": False}, {"wide_scales": False, "noise": 0.3}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_round_trip_on_models(tmp_path, name):
    old, new = (quantized_net(**settings) for settings in PAIRS[name])
    delta = subtract(old, new)
    assert applied(tmp_path, old, new, delta) == new
    assert subtract(old, new) == delta


@pytest.mark.parametrize(
    ("name", "share"),
    [("same", 0.01), ("reordered", 0.05), ("longer producer", 0.03), ("fine-tuned", 0.75), ("one layer more", 0.3)],
)
def test_delta_is_small_where_models_are_alike(name, share):
    old, new = (quantized_net(**settings) for settings in PAIRS[name])
    assert len(subtract(old, new)) < share * len(new)


def test_kept_scales_make_a_smaller_delta():
    old = quantized_net()
    other, kept = quantized_net(noise=0.02), quantized_net(noise=0.02, keep_scales=True)
    assert len(subtract(old, kept)) < len(subtract(old, other))


def test_weights_are_predicted_at_their_new_scale():
    """All scales doubled: the bytes are halved, and the prediction leaves next to nothing to say."""
    old = quantized_net()
    tensors = find_tensors(old)
    new = bytearray(old)
    for i in range(4):
        scale, weight = tensors[f"s{i}"], tensors[f"w{i}"]
        assert weight.scale == scale.name
        place = slice(scale.offset, scale.offset + scale.size_bytes)
        new[place] = (np.frombuffer(old[place], "<f4") * 2).astype("<f4").tobytes()
        place = slice(weight.offset, weight.offset + weight.size_bytes)
        new[place] = np.rint(np.frombuffer(old[place], np.int8) / 2).astype(np.int8).tobytes()
    delta = subtract(old, bytes(new))
    kinds = {Kind(region.kind) for region in parse_header(delta)[0].regions}
    assert Kind.RESCALE in kinds
    assert len(delta) < 0.08 * len(old)


@given(old=st.binary(max_size=4000), new=st.binary(max_size=4000), cut=st.integers(0, 4000), data=st.data())
@settings(max_examples=150, deadline=None)
def test_round_trip_on_any_bytes(tmp_path_factory, old, new, cut, data):
    if data.draw(st.booleans()):
        new = old[:cut] + new + old[cut:]
    folder = tmp_path_factory.mktemp("d", numbered=True)
    assert applied(folder, old, new, subtract(old, new)) == new


@given(data=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 3)), min_size=1, max_size=3000))
@settings(max_examples=60, deadline=None)
def test_coder_round_trip(data):
    symbols = np.array([symbol for symbol, _ in data], np.uint8)
    contexts = np.array([context for _, context in data], np.uint8)
    counts = np.zeros((4, 256), np.int64)
    np.add.at(counts, (contexts, symbols), 1)
    tables = make_tables(counts)
    assert (decoded(encode(symbols, contexts, tables), contexts, tables) == symbols).all()


def decoded(blocks, contexts, tables):
    decoder = Decoder(tables, len(contexts))
    size = rans.BLOCK_BYTES
    parts = [decoder.decode(block, contexts[i * size : (i + 1) * size]) for i, block in enumerate(blocks)]
    decoder.check_end()
    return np.concatenate(parts)


def test_coder_goes_on_from_block_to_block(monkeypatch):
    monkeypatch.setattr(rans, "BLOCK_BYTES", 4096)
    random = np.random.default_rng(0)
    symbols, contexts = random.integers(0, 9, 20_001).astype(np.uint8), random.integers(0, 2, 20_001).astype(np.uint8)
    counts = np.zeros((2, 256), np.int64)
    np.add.at(counts, (contexts, symbols), 1)
    tables = make_tables(counts)
    blocks = encode(symbols, contexts, tables)
    assert len(blocks) == 5
    assert (decoded(blocks, contexts, tables) == symbols).all()
    broken = [*blocks[:-1], blocks[-1][:-2] + bytes([blocks[-1][-2] ^ 1, blocks[-1][-1]])]
    with pytest.raises(ArtifactError):
        decoded(broken, contexts, tables)


def test_coder_is_near_the_entropy():
    random = np.random.default_rng(0)
    contexts = random.integers(0, 3, 200_000).astype(np.uint8)
    symbols = np.rint(random.normal(size=200_000) * np.array([0.5, 3, 12])[contexts]).astype(np.int64).astype(np.uint8)
    counts = np.zeros((3, 256), np.int64)
    np.add.at(counts, (contexts, symbols), 1)
    share = counts / counts.sum(axis=1, keepdims=True)
    entropy = -(counts * np.log2(np.where(share > 0, share, 1))).sum() / 8
    assert sum(map(len, encode(symbols, contexts, make_tables(counts)))) < 1.01 * entropy


@pytest.fixture(scope="module")
def pair():
    old, new = quantized_net(layers=2, width=48), quantized_net(layers=2, width=48, noise=0.05)
    return old, new, subtract(old, new)


@pytest.mark.fault("F25")
def test_truncated_delta_is_refused_at_every_length(tmp_path, pair):
    old, new, delta = pair
    for length in [*range(64), *range(64, len(delta), 97), len(delta) - 1]:
        with pytest.raises(EdgekitError):
            applied(tmp_path, old, new, delta[:length])


@pytest.mark.fault("F25")
def test_flipped_bits_never_give_other_bytes(tmp_path, pair):
    old, new, delta = pair
    random = np.random.default_rng(1)
    for _ in range(120):
        at = int(random.integers(len(delta)))
        broken = bytearray(delta)
        broken[at] ^= 1 << int(random.integers(8))
        try:
            assert applied(tmp_path, old, new, bytes(broken)) == new
        except EdgekitError:
            continue


@pytest.mark.fault("F25")
def test_bytes_behind_the_delta_or_a_base_that_changed(tmp_path, pair):
    old, new, delta = pair
    base = tmp_path / "base"
    base.write_bytes(old[:-1] + b"?")
    with pytest.raises(DeviceError) as caught:
        apply_delta(io.BytesIO(delta), base, io.BytesIO(), ref=ref_of(old, new, delta), size_bytes=len(new))
    assert caught.value.code == "delta.base_changed"
    base.unlink()
    with pytest.raises(DeviceError) as caught:
        apply_delta(io.BytesIO(delta), base, io.BytesIO(), ref=ref_of(old, new, delta), size_bytes=len(new))
    assert caught.value.code == "delta.base_missing"


@pytest.mark.fault("F25")
def test_result_longer_or_other_than_signed(tmp_path, pair):
    old, new, delta = pair
    for size in (len(new) - 1, len(new) + 1):
        with pytest.raises((ArtifactError, TrustError)):
            applied(tmp_path, old, new, delta, size=size)
    lying = subtract(old, new[:-1] + b"?")
    with pytest.raises(TrustError) as caught:
        applied(tmp_path, old, new, lying)
    assert caught.value.code == "delta.digest_mismatch"


def _with(header, **changes):
    return Header(**({name: getattr(header, name) for name in Header.__struct_fields__} | changes))


@pytest.mark.fault("F25")
@pytest.mark.parametrize(
    "changes",
    [
        {"base_size": -1},
        {"target_size": 1 << 50},
        {"regions": [Region(Kind.COPY, 1 << 39, 0)]},
        {"regions": [Region(Kind.COPY, 0, 0)]},
        {"regions": [Region(9, 10, 0)]},
        {"regions": [Region(Kind.WIDE, 10, 0, 3)]},
        {"regions": [Region(Kind.SUBTRACT, 10, 0, 1, 3, 3)]},
        {"regions": [Region(Kind.SUBTRACT, 10, 0, 1, 10, 1, classes=10_000)]},
        {"regions": [Region(Kind.RESCALE, 10, 0, 1, 10, 1, scales=3)]},
        {"regions": [Region(Kind.PRODUCT, 8, 1 << 40, scales=2)]},
        {"blocks": [-5]},
        {"side_size": 1 << 30},
        {"origins": [(0, 3)]},
        {"origins": [(1 << 30, 4)]},
        {"origins": [(-4, 4)]},
        {"origins": [(0, 9 << 20)]},
    ],
)
def test_hostile_header_is_refused(pair, changes):
    _, _, delta = pair
    header = parse_header(delta)[0]
    if "regions" in changes:
        size = sum(region.length for region in changes["regions"])
        changes = changes | {"target_size": size}
    with pytest.raises(ArtifactError) as caught:
        parse_header(encode_header(_with(header, **changes)))
    assert caught.value.code == "delta.malformed"


@pytest.mark.fault("F25")
def test_header_bomb_is_refused_before_it_unfolds():
    packed = pack(bytes(64 << 20))
    with pytest.raises(ArtifactError):
        parse_header(b"EKDELTA1" + len(packed).to_bytes(4, "little") + packed)


@pytest.mark.parametrize(
    ("field", "item", "count"), [(3, b"\x01", 15 << 20), (6, b"\x92\x03\x01", 5 << 20), (11, b"\xff", 15 << 20)]
)
def test_header_of_many_small_records_takes_no_memory(field, item, count):
    """msgpack of 16 MB would become a gigabyte of records."""
    empty = [b"\x01", b"\x01", b"\xc4\x00", b"\x90", b"\xc4\x00", b"\x90", b"\x90", b"\xc4\x00", b"\x90", b"\0", b"\0"]
    fields = [*empty, b"\x90", b"\0", b"\0"]
    assert len(fields) == len(_Columns.__struct_fields__)
    fields[field] = b"\xdd" + count.to_bytes(4, "big") + item * count
    packed = pack(b"\x9e" + b"".join(fields))
    assert len(packed) < 4000
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError):
            parse_header(PREFIX.pack(MAGIC, len(packed)) + packed)
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


def test_tensor_of_many_channels_is_counted_together():
    """An embedding has more rows than tables are worth; counting in each would take 2 kB a row."""
    weight = np.random.default_rng(0).integers(-9, 9, (70_000, 32)).astype(np.int8)
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], axis=0)
    contents = []
    for moved in (0, 1):
        scale = np.linspace(1, 2 + moved, 70_000).astype(np.float32)
        tensors = [numpy_helper.from_array(weight + np.int8(moved), "w"), numpy_helper.from_array(scale, "s")]
        contents.append(helper.make_model(helper.make_graph([node], "embedding", [], [], tensors)).SerializeToString())
    tracemalloc.start()
    try:
        delta = subtract(*contents)
        assert tracemalloc.get_traced_memory()[1] < 70_000 * 2048 / 2
    finally:
        tracemalloc.stop()
    assert len(delta) < 0.3 * len(contents[1])


def test_delta_that_does_not_give_the_target_is_not_published(tmp_path, monkeypatch, caplog):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(quantized_net())
    new.write_bytes(quantized_net(noise=0.01))
    wrong = subtract(old.read_bytes(), new.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(make, "subtract", lambda *_: wrong)
    assert make_delta(old, new, codecs=("tsub1",)) is None
    assert "left out" in caplog.text


def pruned(content, kept, axis):
    """Columns (axis 1, with their scales and biases) or rows of the first layer taken out."""
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name == "w0":
            values = values.take(kept, axis=axis)
        elif tensor.name in {"s0", "b0"} and axis == 1:
            values = values[kept]
        else:
            continue
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    return model.SerializeToString()


@pytest.mark.parametrize("axis", [0, 1])
def test_pruned_channels_are_copied(tmp_path, axis):
    old = quantized_net()
    new = pruned(old, np.sort(np.random.default_rng(3).permutation(96)[:86]), axis)
    delta = subtract(old, new)
    assert applied(tmp_path, old, new, delta) == new
    assert len(delta) < 0.02 * len(new)


@given(
    old=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=12),
    new=st.lists(st.sampled_from([b"a", b"b", b"c", b"d", b"e"]), max_size=12),
)
def test_matched_rows_are_equal_and_runs_cover_them(old, new):
    matches = match_rows(old, new)
    assert [old[match] if match != MISSING else None for match in matches] == [row if row in old else None for row in new]
    told = {
        place + i: source if source == MISSING else source + i for source, place, count in runs(matches) for i in range(count)
    }
    assert told == dict(enumerate(matches))


def test_repeated_rows_are_matched_in_order():
    assert match_rows([b"a", b"b", b"a", b"c"], [b"a", b"b", b"a", b"c"]) == [0, 1, 2, 3]


def flat_net(*, noise=0.0, description="one", layers=3, width=64):
    """A TFLite file of int8 matrices; the last tensor shares its buffer with the first."""
    flatbuffers = pytest.importorskip("flatbuffers")
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    base, drift = np.random.default_rng(0), np.random.default_rng(1)
    buffers, tensors = [schema.BufferT()], []
    for i in range(layers):
        weight = base.standard_t(4, size=(width, width)) + noise * drift.normal(size=(width, width))
        scale = np.abs(weight).max(axis=1) / 127
        buffer, tensor, quantization = schema.BufferT(), schema.TensorT(), schema.QuantizationParametersT()
        buffer.data = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8).view(np.uint8).ravel()
        quantization.scale, quantization.zeroPoint = scale.astype(np.float32), np.zeros(width, np.int64)
        tensor.name, tensor.shape, tensor.buffer = f"w{i}".encode(), [width, width], len(buffers)
        tensor.type, tensor.quantization = schema.TensorType.INT8, quantization
        buffers.append(buffer)
        tensors.append(tensor)
    shared = schema.TensorT()
    shared.name, shared.shape, shared.buffer, shared.type = b"again", [width, width], 1, schema.TensorType.INT8
    graph, model = schema.SubGraphT(), schema.ModelT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = [*tensors, shared], [], [], []
    model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [graph], buffers, []
    model.description = description.encode()
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_tensors_of_a_tflite_file(tmp_path):
    old, new = flat_net(), flat_net(noise=0.1, description="another, and a longer one")
    found = find_flat_tensors(old)
    assert set(found) == {"0/again", *(f"0/w{i}{part}" for i in range(3) for part in ("", "#scale"))}
    assert (found["0/w1"].shape, found["0/w1"].scale, found["0/w1"].axis) == ((64, 64), "0/w1#scale", 0)
    delta = subtract(old, new)
    assert applied(tmp_path, old, new, delta) == new
    assert len(delta) < 0.5 * len(new)
    assert len(delta) < 0.7 * len(hdiffpatch.diff(old, new, compression="lzma2"))
    assert find_tensors(old) == {}


def test_walk_on_a_broken_tflite_file():
    good, random = flat_net(layers=1, width=16), np.random.default_rng(4)
    for _ in range(500):
        broken = bytearray(good)
        for at in random.integers(len(good), size=4):
            broken[at] = int(random.integers(256))
        for tensor in find_flat_tensors(bytes(broken)).values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.size_bytes <= len(good)
    for length in range(0, len(good), 7):
        find_flat_tensors(good[:length])


def test_smallest_is_kept_and_none_when_nothing_is_gained(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(quantized_net())
    new.write_bytes(quantized_net(noise=0.01))
    made = make_delta(old, new)
    assert (made.codec, made.content) == ("tsub1", subtract(old.read_bytes(), new.read_bytes()))
    shifted = old.read_bytes()
    old.write_bytes(np.random.default_rng(0).bytes(50_000) + shifted[:100])
    new.write_bytes(old.read_bytes()[20_000:] + old.read_bytes()[:20_000])
    assert make_delta(old, new).codec == "hdiff"
    new.write_bytes(np.random.default_rng(1).bytes(50_000))
    assert make_delta(old, new) is None


def test_hdiff_round_trip_and_its_absence(tmp_path, monkeypatch):
    old = tmp_path / "old"
    new = tmp_path / "new"
    old.write_bytes(np.random.default_rng(0).bytes(50_000))
    new.write_bytes(old.read_bytes()[30_000:] + old.read_bytes()[:30_000])
    made = make_delta(old, new, codecs=("hdiff",))
    assert applied(tmp_path, old.read_bytes(), new.read_bytes(), made.content, codec="hdiff") == new.read_bytes()
    with pytest.raises(ArtifactError):
        applied(tmp_path, old.read_bytes(), new.read_bytes(), made.content[:-9], codec="hdiff")
    monkeypatch.setitem(sys.modules, "hdiffpatch", None)
    with pytest.raises(DeviceError) as caught:
        applied(tmp_path, old.read_bytes(), new.read_bytes(), made.content, codec="hdiff")
    assert caught.value.code == "delta.unsupported"


def test_walk_on_anything_finds_tensors_or_nothing():
    random = np.random.default_rng(2)
    good = quantized_net(layers=1, width=16)
    assert set(find_tensors(good)) == {"w0", "s0", "b0"}
    for _ in range(300):
        broken = bytearray(good)
        for at in random.integers(len(good), size=3):
            broken[at] = int(random.integers(256))
        for tensor in find_tensors(bytes(broken)).values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.size_bytes <= len(good)


MEMORY = """
import io, sys
from pathlib import Path
from edgekit.bundle.delta.apply import apply_delta
from edgekit.schema.release import DeltaRef
import msgspec
folder = Path(sys.argv[1])
ref = msgspec.json.decode((folder / "ref.json").read_bytes(), type=DeltaRef)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
with (folder / "delta").open("rb") as source, (folder / "out").open("wb") as out:
    apply_delta(source, folder / "old", out, ref=ref, size_bytes=int(sys.argv[2]))
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    import msgspec

    grown = []
    for width in (512, 1536):
        folder = tmp_path / str(width)
        folder.mkdir()
        old, new = (quantized_net(layers=2, width=width, noise=noise) for noise in (0.0, 0.02))
        delta = subtract(old, new)
        (folder / "old").write_bytes(old)
        (folder / "delta").write_bytes(delta)
        (folder / "ref.json").write_bytes(msgspec.json.encode(ref_of(old, new, delta)))
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(folder), str(len(new))], capture_output=True, text=True, check=True
        )
        assert (folder / "out").read_bytes() == new
        grown.append(int(done.stdout) / 1000)
    assert grown[1] < grown[0] + 25  # MB: blocks and chunks are bounded, whatever the size
