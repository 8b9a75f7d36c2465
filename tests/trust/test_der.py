"""The DER writer and reader against asn1crypto and arbitrary bytes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from asn1crypto import core
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import ArtifactError
from edgekit.trust import der


@given(value=st.integers(0, 1 << 400))
def test_integer_is_theirs(value):
    assert der.integer(value) == core.Integer(value).dump()


@given(content=st.binary(max_size=70_000))
def test_string_of_any_length_is_theirs_and_read_back(content):
    made = der.octets(content)
    assert made == core.OctetString(content).dump()
    (read,) = der.read_all(made)
    assert (read.tag, read.content, read.raw) == (der.OCTET_STRING, content, made)


@given(rest=st.lists(st.integers(0, 1 << 70), max_size=8), second=st.integers(0, 39), first=st.integers(0, 1))
def test_object_identifier_is_theirs(first, second, rest):
    dotted = ".".join(map(str, (first, second, *rest)))
    assert der.oid(dotted) == core.ObjectIdentifier(dotted).dump()


@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data):
    try:
        found = der.read_all(data)
    except ArtifactError:
        return
    assert b"".join(each.raw for each in found) == data


@given(data=st.binary(min_size=1, max_size=300), label=st.sampled_from(["CERTIFICATE", "PRIVATE KEY"]))
def test_pem_is_read_back(data, label):
    text = der.to_pem(data, label)
    assert der.from_pem("before\n" + text + text, label) == (data, data)
    assert der.from_pem(text, "X509 CRL") == ()
    assert max(map(len, text.splitlines())) <= 64


@pytest.mark.parametrize(
    ("tag", "text", "moment"),
    [
        (der.UTC_TIME, b"491231235959Z", datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (der.UTC_TIME, b"500101000000Z", datetime(1950, 1, 1, tzinfo=UTC)),
        (der.GENERALIZED_TIME, b"20500101000000Z", datetime(2050, 1, 1, tzinfo=UTC)),
    ],
)
def test_time_is_of_the_right_century(tag, text, moment):
    assert der.Element(tag, text, b"").time() == moment


def test_time_that_is_none_is_refused():
    with pytest.raises(ArtifactError):
        der.Element(der.UTC_TIME, b"yesterday", b"").time()
