"""Deltas: every pair gives back the same bytes, in bounded memory; anything else is refused with an error of ours."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.delta.apply import apply_delta
from edgekit.bundle.delta.layout import Header, Kind, Region, encode_header, pack, parse_header
from edgekit.bundle.delta.make import make_delta, subtract
from edgekit.bundle.delta.rans import decode_block, encode_block, make_tables
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
    assert (decode_block(encode_block(symbols, contexts, tables), contexts, tables) == symbols).all()


def test_coder_is_near_the_entropy():
    random = np.random.default_rng(0)
    contexts = random.integers(0, 3, 200_000).astype(np.uint8)
    symbols = np.rint(random.normal(size=200_000) * np.array([0.5, 3, 12])[contexts]).astype(np.int64).astype(np.uint8)
    counts = np.zeros((3, 256), np.int64)
    np.add.at(counts, (contexts, symbols), 1)
    share = counts / counts.sum(axis=1, keepdims=True)
    entropy = -(counts * np.log2(np.where(share > 0, share, 1))).sum() / 8
    assert len(encode_block(symbols, contexts, make_tables(counts))) < 1.01 * entropy


@pytest.fixture(scope="module")
def pair():
    old, new = quantized_net(layers=2, width=48), quantized_net(layers=2, width=48, noise=0.05)
    return old, new, subtract(old, new)


def test_truncated_delta_is_refused_at_every_length(tmp_path, pair):
    old, new, delta = pair
    for length in [*range(64), *range(64, len(delta), 97), len(delta) - 1]:
        with pytest.raises(EdgekitError):
            applied(tmp_path, old, new, delta[:length])


def test_flipped_bits_never_give_other_bytes(tmp_path, pair):
    old, new, delta = pair
    random = np.random.default_rng(1)
    for _ in range(300):
        at = int(random.integers(len(delta)))
        broken = bytearray(delta)
        broken[at] ^= 1 << int(random.integers(8))
        try:
            assert applied(tmp_path, old, new, bytes(broken)) == new
        except EdgekitError:
            continue


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


def test_header_bomb_is_refused_before_it_unfolds():
    packed = pack(bytes(64 << 20))
    with pytest.raises(ArtifactError):
        parse_header(b"EKDELTA1" + len(packed).to_bytes(4, "little") + packed)


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
    for width in (512, 2048):
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
