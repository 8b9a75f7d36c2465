"""Shipped profiles, and profile files that people write."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.target import TargetProfile
from edgekit.target.load import list_targets, load_target, parse_target, profiles_dir, target_digest

NAMES = [
    "android-arm64-litert",
    "cortex-m4-tflm",
    "cortex-m7-tflm",
    "imx8m-plus-cpu",
    "jetson-orin-nano-cpu",
    "raspberry-pi-3",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "raspberry-pi-zero-2w",
    "rockchip-rk3588",
    "x86-64-avx2",
    "x86-64-avx512-vnni",
    "x86-64-sse42",
]
PI_4 = (profiles_dir() / "raspberry-pi-4.toml").read_text(encoding="utf-8")


def refused(text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        parse_target(text, source="mine.toml")
    assert caught.value.message.startswith("mine.toml: ")
    assert caught.value.hint
    return caught.value


# --- shipped ----------------------------------------------------------------------------------------------------------------


def test_every_promised_profile_is_shipped():
    assert [profile.name for profile in list_targets()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_fact_names_its_source(name):
    profile = load_target(name)
    facts = ["cpu", "isa", "cores", "ram_mb", "runtime", "int8", "channel_multiple"]
    facts += [field for field in ("flash_mb", "clock_mhz", "device_model") if getattr(profile, field)]
    assert sorted(profile.sources) == sorted(facts)


@pytest.mark.parametrize("name", NAMES)
def test_int8_rules_follow_the_kernels(name):
    profile = load_target(name)
    rules = profile.int8
    assert rules.weights == "int8"
    assert rules.weight_symmetric
    assert rules.per_channel
    assert rules.format == ("qdq" if profile.runtime == "onnxruntime" else "litert")
    if profile.arch == "x86-64":
        assert rules.activations == "uint8"
        assert rules.reduce_range == (not any("vnni" in flag for flag in profile.isa))
    else:
        assert rules.activations == "int8"
        assert not rules.reduce_range


@pytest.mark.parametrize("name", NAMES)
def test_channel_multiple_fills_a_register(name):
    profile = load_target(name)
    expected = 4 if profile.arch == "armv7e-m" else 16 if "avx512f" in profile.isa else 8
    assert profile.channel_multiple == expected


def test_micro_controllers_have_a_budget_of_their_memory():
    for name in ("cortex-m4-tflm", "cortex-m7-tflm"):
        profile = load_target(name)
        assert (profile.budget.ram_mb, profile.budget.flash_mb) == (profile.ram_mb, profile.flash_mb)


@pytest.mark.parametrize("name", NAMES)
def test_profile_survives_json_and_keeps_its_digest(name):
    profile = load_target(name)
    again = decode_json(encode_json(profile), TargetProfile)
    assert again == profile
    assert target_digest(again) == target_digest(profile)


def test_digest_changes_with_any_fact():
    profile = load_target("raspberry-pi-4")
    assert target_digest(msgspec.structs.replace(profile, cores=3)) != target_digest(profile)


# --- names ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("rasberry-pi-4", "raspberry-pi-4"),
        ("Raspberry_Pi_5", "raspberry-pi-5"),
        ("pi4", "raspberry-pi-4"),
        ("rk3588", "rockchip-rk3588"),
        ("x86-64-avx", "x86-64-avx2"),
        ("hots", "host"),
    ],
)
def test_wrong_name_suggests_the_nearest(wrong, nearest):
    with pytest.raises(UsageError) as caught:
        load_target(wrong)
    assert caught.value.code == "target.unknown"
    assert caught.value.message == f"{wrong}: no such target."
    assert caught.value.hint == f'did you mean "{nearest}"? See them all with: edgekit target list'


@pytest.mark.parametrize("wrong", ["", "zzzz", "../raspberry-pi-4", "targets"])
def test_name_like_no_other_still_says_where_to_look(wrong):
    with pytest.raises(UsageError) as caught:
        load_target(wrong)
    assert caught.value.code == "target.unknown"
    assert "edgekit target list" in caught.value.hint


@pytest.mark.parametrize("name", ["host", "this-machine"])
def test_host_is_probed(name):
    assert load_target(name).name == "this-machine"


# --- files ------------------------------------------------------------------------------------------------------------------


def test_file_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(PI_4.replace('name = "raspberry-pi-4"', 'name = "mine"'), encoding="utf-8")
    assert load_target(str(path)).name == "mine"


def test_file_that_is_missing(tmp_path):
    with pytest.raises(UsageError) as caught:
        load_target(str(tmp_path / "gone.toml"))
    assert caught.value.code == "target.not_found"


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError) as caught:
        load_target(str(path))
    assert caught.value.code == "target.malformed"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\ncores = 4", "\ncoress = 4", 'mine.toml: unknown key "coress"; did you mean "cores"?'),
        ("per_channel", "perchannel", 'mine.toml: unknown key "int8.perchannel"; did you mean "per_channel"?'),
        ("\ncores = 4", "\nqqq = 4", 'mine.toml: unknown key "qqq".'),
        ("\ncores = 4", '\ncores = 4\n[budget]\nram = 3\n[int8x]\ny = "z"', 'mine.toml: unknown key "budget.ram"'),
    ],
)
def test_unknown_key_suggests_the_nearest(old, new, message):
    error = refused(PI_4.replace(old, new))
    assert error.code == "target.unknown_key"
    assert error.message.startswith(message)
    assert "Known keys:" in error.hint


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("cores = 4", 'cores = "four"', "$.cores"),
        ('isa = ["neon"]', "isa = [1]", "$.isa[0]"),
        ("per_channel = true", "per_channel = 1", "$.int8.per_channel"),
        ('activations = "int8"', 'activations = "int4"', "$.int8.activations"),
        ('arch = "aarch64"', 'arch = "arm"', "$.arch"),
        ('arch = "aarch64"', "", "arch"),
    ],
)
def test_wrong_type_names_the_field(old, new, path):
    assert old in PI_4
    error = refused(PI_4.replace(old, new))
    assert error.code == "target.invalid"
    assert path in error.message


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("cores = 4", "cores = 0", "cores must be at least 1"),
        ("threads = 1", "threads = 5", "threads must be 1 to 4"),
        ("ram_mb = 4000", "ram_mb = 0", "ram_mb must be a positive number"),
        ("ram_mb = 4000", "ram_mb = nan", "ram_mb must be a positive number"),
        ("clock_mhz = 1800", "clock_mhz = -inf", "clock_mhz must be a positive number"),
        ("channel_multiple = 8\n", "channel_multiple = 0\n", "channel_multiple must be at least 1"),
        ('isa = ["neon"]', 'isa = ["neon", "dotprd"]', 'unknown flag "dotprd" for aarch64; did you mean "dotprod"?'),
        ('isa = ["neon"]', 'isa = ["avx2"]', 'unknown flag "avx2" for aarch64'),
        ('runtime = "onnxruntime"', 'runtime = "litert"', "int8.format must be litert"),
        ('format = "qdq"', 'format = "litert"', "needs runtime litert or tflm"),
        ('runtime = "onnxruntime"', 'runtime = "tflm"', "need each other"),
        ("[sources]\n", '[sources]\ncpus = "x"\n', "sources.cpus names no field"),
    ],
)
def test_facts_that_make_no_sense(old, new, reason):
    assert old in PI_4
    error = refused(PI_4.replace(old, new))
    assert error.code == "target.invalid"
    assert reason in error.message


def test_sources_are_asked_for():
    head, _, _sources = PI_4.partition("[sources]")
    assert "sources must name" in refused(head + "[sources]\n").message


def test_text_that_is_no_toml():
    error = refused("name = = 3")
    assert error.code == "target.malformed"
    assert "line 1" in error.message


@given(st.text(max_size=200))
def test_any_text_is_refused_with_a_usage_error(text):
    with pytest.raises(UsageError):
        parse_target(text, source="mine.toml")


@given(st.data())
def test_any_value_in_any_field_is_accepted_or_refused_with_a_usage_error(data):
    lines = PI_4.splitlines()
    fields = [i for i, line in enumerate(lines) if " = " in line]
    index = data.draw(st.sampled_from(fields))
    value = data.draw(
        st.sampled_from(['""', "[]", "{}", "0", "-1", "1e400", "nan", "true", "[[1]]", "{ a = 1 }", "2020-01-01"])
    )
    lines[index] = f"{lines[index].split(' = ')[0]} = {value}"
    with contextlib.suppress(UsageError):  # anything else fails the test
        assert parse_target("\n".join(lines), source="mine.toml").sources
