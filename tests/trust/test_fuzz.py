"""A short version of scripts/fuzz for every run of the tests, and what the long ones found."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import hdiffpatch
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from tuf.api.metadata import Metadata

from edgekit.agent.plan import parse_version
from edgekit.agent.validity import find_ban
from edgekit.bundle.delta.apply import apply_delta
from edgekit.bundle.delta.layout import Kind, Region, encode_header, parse_header
from edgekit.bundle.reader import parse_manifest
from edgekit.errors import ArtifactError, TrustError
from edgekit.schema.base import encode_json
from edgekit.schema.digest import digest_bytes
from edgekit.schema.release import DeltaRef
from edgekit.schema.state import AgentState, Floors, Slot
from edgekit.trust.floors import RoleVersions, raise_roles
from edgekit.trust.metadata import list_releases, recalls_of, refuse_duplicate_keys
from edgekit.trust.offline import read_stick
from tests.fuzzing.examine import MAX_TRACED_BYTES, PROGRAMS, Examiner, Figures
from tests.fuzzing.mutation import Dice, Sample, mutate_json
from tests.fuzzing.targets import NAMES, NOW, PARTS, PLANNED, RAW, Target, sign_again, target_of

ROOT = Path(__file__).resolve().parents[2]
INPUTS = {"zip": 800, "stick": 500, "delta": 400}
TARGETS = {name: target_of(name) for name in NAMES}


@pytest.mark.fault("F32")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_refusals_comes_out(name):
    target = TARGETS[name]

    @settings(
        max_examples=INPUTS.get(name, 1200),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(program=PROGRAMS)
    def one(program):
        target.run(target.make(program))

    one()


@pytest.mark.parametrize("name", NAMES)
def test_undamaged_input_is_accepted(name):
    target = TARGETS[name]
    assert all(target.run(data) for data in target.seeds)
    assert target.run(target.make(b""))
    assert target.decode(RAW + target.seeds[0]) == target.seeds[0]
    assert target.decode(PLANNED + bytes(range(40))) == target.make(bytes(range(40)))


# --- the machinery itself: an engine that cannot find anything finds nothing


class Broken(Target):
    """Fails in the ways that must be noticed."""

    name = "broken"
    seeds = (b"fine",)

    def make(self, program):
        return program

    def accept(self, data):
        if data == b"foreign":
            raise KeyError(data)
        if data == b"refused":
            raise ArtifactError("x.y", "refused")
        if data == b"large":
            bytearray(MAX_TRACED_BYTES + 1)


def examined(tmp_path, data, *, at=1):
    examiner = Examiner(Broken(), Figures("broken", "none", inputs=at - 1), folder=tmp_path)
    examiner.examine(data)
    return examiner.figures


def test_foreign_exception_is_a_finding_and_its_input_is_kept(tmp_path):
    assert list(examined(tmp_path, b"foreign").findings) == ["KeyError at test_fuzz.py:accept"]
    assert [path.read_bytes() for path in tmp_path.glob("*.bin")] == [b"foreign"]


def test_refusal_is_no_finding(tmp_path):
    figures = examined(tmp_path, b"refused")
    assert (figures.findings, figures.accepted) == ({}, 0)
    assert examined(tmp_path, b"fine").accepted == 1


def test_large_allocation_is_a_finding(tmp_path):
    assert list(examined(tmp_path, b"large", at=64).findings) == ["memory"]


def test_spans_cover_every_value_key_and_member():
    text = b'{"a": [1, {"b": null}], "c": "x\\"}"}'
    sample = Sample.of_json(text)
    found = {text[span.begin : span.end] for span in sample.of_kind("value")}
    assert found == {text, b'[1, {"b": null}]', b"1", b'{"b": null}', b"null", b'"x\\"}"'}
    assert [text[span.begin : span.end] for span in sample.of_kind("key")] == [b'"a"', b'"b"', b'"c"']
    assert b'"a": [1, {"b": null}], ' in {text[span.begin : span.end] for span in sample.of_kind("member")}
    assert mutate_json(sample, Dice(b"")) == msgspec.json.format(text, indent=2) + b"\n"


def test_script_runs_and_goes_on_where_it_stopped(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "fuzz"),
        "--engine",
        "hypothesis",
        "--target",
        "dsse",
        "--cache",
        tmp_path,
    ]
    for inputs in ("60", "100"):
        done = subprocess.run([*command, "--inputs", inputs], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1].split()[:3] == ["dsse", "hypothesis", inputs]
    assert json.loads((tmp_path / "dsse" / "hypothesis.json").read_bytes())["parts"] == 2


# --- what was found


def signed_targets(change):
    """Targets metadata as a device reads it once its signatures are checked."""
    content = json.loads(TARGETS["metadata"].seeds[0])
    change(content["signed"])
    return Metadata.from_bytes(json.dumps(content).encode()).signed


FIRST = "models/kws/1.0.0/production/manifest.json"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("notes", "\ud800"),
        ("counter", 2**64),
        ("counter", 2**53),
        ("counter", -1),
        ("installed_bytes", 10**40),
        ("published_at", "2026-11-01T12:00:00"),
        ("valid_until", "2026-11-01T12:00:00"),
    ],
)
def test_release_that_cannot_be_used_is_passed_over(field, value):
    def change(signed):
        signed["targets"][FIRST]["custom"][field] = value

    assert [release.info.version for release in list_releases(signed_targets(change), {})] == ["2.0.0"]


@pytest.mark.parametrize(("field", "value"), [("reason", "\udc00"), ("deadline", "2026-11-01T12:00:00")])
def test_recall_that_cannot_be_read_is_not_taken_for_none(field, value):
    def change(signed):
        signed["targets"]["recalls.json"]["custom"]["recalls"][0][field] = value

    with pytest.raises(TrustError) as caught:
        recalls_of(signed_targets(change))
    assert caught.value.code == "trust.metadata"


@pytest.mark.parametrize("keyid", [None, 7, "\ud800", 0.5, True])
def test_delegated_role_with_a_key_id_that_is_no_text(keyid):
    def change(signed):
        signed["delegations"]["roles"][0]["keyids"].append(keyid)

    with pytest.raises(TrustError) as caught:
        refuse_duplicate_keys(signed_targets(change))
    assert caught.value.code == "trust.metadata"


def test_delegated_role_whose_name_is_no_text():
    def change(signed):
        signed["delegations"]["roles"][0]["name"] = "kws\ud83d"

    with pytest.raises(TrustError) as caught:
        refuse_duplicate_keys(signed_targets(change))
    assert caught.value.code == "trust.metadata"


def test_validity_that_ended_before_the_calendar_begins_in_utc():
    until = datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))
    ban = find_ban(AgentState(device="cam-7"), Slot(name="a", model="kws", valid_until=until), NOW)
    assert ban is not None
    assert ban.code == "release.expired"


def test_validity_is_told_in_utc():
    until = datetime(2026, 10, 1, 8, 30, tzinfo=UTC)
    ban = find_ban(AgentState(device="cam-7"), Slot(name="a", model="kws", version="1", valid_until=until), NOW)
    assert ban is not None
    assert ban.reason == "kws@1 was valid until 2026-10-01 08:30 UTC"


@pytest.mark.parametrize(
    ("text", "version"), [("1.32.0", (1, 32, 0)), ("1" * 5000, (111111111,)), ("\u0663.\u0661", ()), ("", ())]
)
def test_runtime_version_of_any_length(text, version):
    assert parse_version(text) == version


def test_version_that_says_true_is_kept_as_a_number(tmp_path):
    stick = TARGETS["stick"]
    (tmp_path / "metadata").mkdir()
    for seed, name in zip(stick.seeds, ("3.targets.json", "2.root.json", "1.kws-team.json"), strict=True):
        data = seed[1:]
        if name == "1.kws-team.json":
            data = sign_again(data.replace(b'"version":1}', b'"version":true}'))
            assert b"true" in data
        (tmp_path / "metadata" / name).write_bytes(data)
    offline = read_stick(tmp_path, root=stick.provisioned, floors=Floors(), now=NOW).floors
    seen = RoleVersions(root=True, timestamp=True, snapshot=True, targets=True, delegated={"kws-team:1": True})
    for floors in (offline, raise_roles(Floors(), seen, NOW)):
        assert floors.delegated
        assert msgspec.json.decode(encode_json(floors), type=Floors) == floors


def refused_delta(data, *, codec="tsub1"):
    target = TARGETS["delta"]
    ref = DeltaRef(
        base=digest_bytes(target.old), target=digest_bytes(target.new), digest=digest_bytes(data), size_bytes=1, codec=codec
    )
    with pytest.raises(ArtifactError) as caught:
        apply_delta(io.BytesIO(data), target.base, io.BytesIO(), ref=ref, size_bytes=len(target.new))
    assert caught.value.code == "delta.malformed"


@pytest.mark.parametrize("claim", [b"\xff" * 8 + b"\x7f", b"\xbf\xff\xff\xff\x7f", b"\x00", b"\xff" * 40, b""])
def test_hdiff_that_claims_another_size_is_refused_before_it_is_allocated(claim, monkeypatch):
    monkeypatch.setattr(hdiffpatch, "apply", lambda *_: pytest.fail("it was applied"))
    data = TARGETS["hdiff"].seeds[0]
    refused_delta(data[:14] + claim + data[16:] if claim else data[:14], codec="hdiff")


def changed_header(**changes):
    data = TARGETS["delta"].seeds[0]
    header, end = parse_header(data)
    return encode_header(msgspec.structs.replace(header, **changes)) + data[end:]


def test_delta_for_larger_files_than_there_are():
    header, _ = parse_header(TARGETS["delta"].seeds[0])
    regions = [*header.regions, Region(Kind.COPY, 1 << 30, 0)]
    sizes = {"base_size": 1 << 31, "target_size": header.target_size + (1 << 30)}
    refused_delta(changed_header(regions=regions, **sizes))
    refused_delta(changed_header(base_size=header.base_size + 1))


@pytest.mark.parametrize("width", [0, -1, 2, 1 << 40])
def test_delta_region_that_would_be_read_in_one_piece(width):
    header, _ = parse_header(TARGETS["delta"].seeds[0])
    at = next(number for number, region in enumerate(header.regions) if region.kind == Kind.SUBTRACT)
    regions = list(header.regions)
    regions[at] = msgspec.structs.replace(regions[at], width=width)
    refused_delta(changed_header(regions=regions))


@pytest.mark.parametrize("size", [b"18446744073709551616", b"1" + b"0" * 300, b"9007199254740992"])
def test_manifest_with_a_size_that_no_disk_has(size):
    data = PARTS["manifest.json"].replace(b'"size_bytes": 350', b'"size_bytes": ' + size, 1)
    assert size in data
    with pytest.raises(ArtifactError) as caught:
        parse_manifest(data)
    assert caught.value.code == "record.malformed"
