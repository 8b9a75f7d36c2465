from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import TrustError
from edgekit.schema.release import Release, ReleaseInfo
from edgekit.schema.state import Floors
from edgekit.trust.floors import RoleVersions, check_release, check_roles, raise_release, raise_roles, reference_time

NOW = datetime(2026, 11, 20, tzinfo=UTC)
number = st.integers(0, 50)
versions = st.builds(RoleVersions, root=number, timestamp=number, snapshot=number, targets=number)
floors = st.builds(Floors, root=number, timestamp=number, snapshot=number, targets=number)


def release(counter: int, name: str = "kws") -> Release:
    info = ReleaseInfo(
        name=name, version="1", channel="production", counter=counter, published_at=NOW, installed_bytes=1, runtimes=()
    )
    return Release(info=info, manifest_path="p", manifest_digest="sha256:" + "0" * 64, manifest_size_bytes=1)


def is_accepted(floor: Floors, seen: RoleVersions) -> bool:
    try:
        check_roles(floor, seen)
    except TrustError:
        return False
    return True


@given(floors, versions)
def test_what_was_accepted_is_accepted_again(floor, seen):
    if is_accepted(floor, seen):
        assert is_accepted(raise_roles(floor, seen, NOW), seen)


@given(floors, versions)
def test_floors_never_decrease_under_one_root(floor, seen):
    raised = raise_roles(floor, seen, NOW)
    assert raised.root >= floor.root
    if seen.root <= floor.root:
        assert raised.targets >= floor.targets
        assert raised.timestamp >= floor.timestamp
        assert raised.snapshot >= floor.snapshot


@given(floors, versions)
def test_anything_older_is_refused(floor, seen):
    is_older = seen.root < floor.root
    if seen.root == floor.root:
        is_older = any(getattr(seen, role) < getattr(floor, role) for role in ("targets", "timestamp", "snapshot"))
    assert is_accepted(floor, seen) == (not is_older)


def test_new_root_resets_what_a_thief_of_online_keys_may_have_raised():
    floor = Floors(root=1, timestamp=1000, snapshot=1000, targets=1000)
    seen = RoleVersions(root=2, timestamp=2, snapshot=2, targets=5)
    assert is_accepted(floor, seen)
    raised = raise_roles(floor, seen, NOW)
    assert (raised.root, raised.timestamp, raised.snapshot, raised.targets) == (2, 2, 2, 5)
    assert not is_accepted(raised, RoleVersions(root=2, timestamp=2, snapshot=2, targets=4))


def test_message_names_role_and_versions():
    with pytest.raises(TrustError, match="snapshot version 3 is older than 4"):
        check_roles(Floors(root=1, snapshot=4), RoleVersions(root=1, timestamp=9, snapshot=3, targets=9))


@pytest.mark.fault("F10")
@given(st.lists(st.integers(-1000, 1000)))
def test_reference_time_never_goes_back(offsets):
    floor, last = Floors(), NOW - timedelta(days=1)
    for offset in offsets:
        now = NOW + timedelta(seconds=offset)
        time = reference_time(floor, now)
        assert time >= now
        assert time >= last or floor.time is None
        floor = raise_roles(floor, RoleVersions(root=1, timestamp=1, snapshot=1, targets=1), now)
        assert floor.time == time
        last = time


@given(st.lists(number, min_size=1))
def test_release_floor_is_the_highest_committed(counters):
    floor = Floors()
    for counter in counters:
        floor = raise_release(floor, release(counter))
    assert floor.releases == {"kws": max(counters)}
    check_release(floor, release(max(counters)))
    check_release(floor, release(0, name="other"))
    with pytest.raises(TrustError):
        check_release(floor, release(max(counters) - 1))
