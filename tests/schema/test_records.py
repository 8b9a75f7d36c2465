"""Every record survives its encoding; damage gives our error and nothing else."""

from __future__ import annotations

import typing
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import ArtifactError, EdgekitError, TrustError
from edgekit.schema import candidate, contract, desired, manifest, measurement, message, release, state, target
from edgekit.schema.base import decode_json, decode_msgpack, encode_json, encode_msgpack
from edgekit.schema.digest import Digest, digest_bytes, digest_file, hex_of, is_same_digest, short

RECORDS = [
    candidate.Candidate,
    contract.Contract,
    desired.DesiredState,
    manifest.Manifest,
    manifest.GoldenSet,
    measurement.LatencyReport,
    measurement.EvalReport,
    release.Release,
    release.ReleaseInfo,
    state.AgentState,
    state.AgentStatus,
    target.TargetProfile,
]
MESSAGES = [message.Birth, message.Death, message.Heartbeat, message.WindowBatch, message.Event, message.Reported]
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9_-]{0,20}[a-z0-9])?", fullmatch=True)


def values(hint: typing.Any) -> st.SearchStrategy[typing.Any]:
    """A strategy for one field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        if arguments[0] is not str:
            return within(values(arguments[0]), arguments[1:])
        pattern = next((meta.pattern for meta in arguments[1:] if getattr(meta, "pattern", None)), "")
        return st.binary().map(digest_bytes) if "sha256" in pattern else NAMES
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return st.lists(values(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*(values(argument) for argument in arguments))
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if origin is not None:
        return st.one_of(*(values(argument) for argument in arguments))
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return records(hint)
    return {
        str: st.text(max_size=20),
        int: st.integers(-(2**53), 2**53),
        float: st.floats(allow_nan=False, allow_infinity=False, width=32).map(lambda x: x + 0.5 if x == int(x) else x),
        bool: st.booleans(),
        bytes: st.binary(max_size=20),
        datetime: st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - hypothesis wants naive bounds
        type(None): st.none(),
    }[hint]


def within(drawn: st.SearchStrategy[typing.Any], rules: tuple[typing.Any, ...]) -> st.SearchStrategy[typing.Any]:
    """What the type's bounds allow."""
    low = next((rule.ge for rule in rules if getattr(rule, "ge", None) is not None), None)
    high = next((rule.le for rule in rules if getattr(rule, "le", None) is not None), None)
    return drawn if low is None else drawn.map(lambda value: min(max(value, low), high))


def records(kind: type[msgspec.Struct]) -> st.SearchStrategy[typing.Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return st.fixed_dictionaries({name: values(hints[name]) for name in kind.__struct_fields__}).map(
        lambda fields: kind(**fields)
    )


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_record_survives_json(kind):
    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(records(kind))
    def check(record):
        encoded = encode_json(record)
        assert decode_json(encoded, kind) == record
        assert encode_json(decode_json(encoded, kind)) == encoded

    check()


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_message_survives_msgpack(kind):
    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    @given(records(kind))
    def check(record):
        assert decode_msgpack(encode_msgpack(record), message.AnyMessage) == record

    check()


@given(st.binary(max_size=200))
def test_garbage_is_our_error(data):
    for kind in (candidate.Candidate, manifest.Manifest, state.AgentState):
        with pytest.raises(ArtifactError) as caught:
            decode_json(data, kind, name="x.json")
        assert caught.value.code == "record.malformed"
        assert "x.json" in caught.value.message


def test_unknown_field_is_ignored_in_records_and_refused_in_targets():
    assert decode_json(b'{"device": "a", "later": 1}', state.AgentState).device == "a"
    with pytest.raises(ArtifactError):
        decode_json(b'{"weights": "int8", "wieghts": "int8"}', target.Int8Rules)


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "../x", "a b", "-a", "a" * 65, "a\n"])
def test_model_name_refused(name):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(name, manifest.ModelName)


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:" + "0" * 63, "sha256:" + "G" * 64, "md5:" + "0" * 64, "sha256:" + "0" * 64 + "\n"]
)
def test_digest_refused(digest):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(digest, Digest)


def test_digest_of_file_equals_digest_of_bytes(tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(b"x" * 3_000_000)
    assert digest_file(path) == digest_bytes(b"x" * 3_000_000)
    assert is_same_digest(digest_file(path), digest_bytes(b"x" * 3_000_000))
    assert hex_of(digest_file(path)).startswith(short(digest_file(path)))


def test_error_survives_pickling():
    import pickle

    error = pickle.loads(pickle.dumps(TrustError("trust.expired", "old", hint="refresh")))
    assert isinstance(error, TrustError)
    assert isinstance(error, EdgekitError)
    assert (error.code, error.message, error.hint) == ("trust.expired", "old", "refresh")
