"""What ends a model's service: recalls and the end of validity, by a clock that cannot be set back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from edgekit.agent.plan import choose_release
from edgekit.agent.validity import find_ban
from edgekit.schema.digest import digest_bytes
from edgekit.schema.release import Recall, Release, ReleaseInfo
from edgekit.schema.state import AgentState, Floors, Slot

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
MODEL, MANIFEST = digest_bytes(b"model"), digest_bytes(b"manifest")
SLOT = Slot(name="a", status="active", model="m", version="1.0", counter=3, manifest=MANIFEST, model_digest=MODEL)


def state_with(*recalls, slot=SLOT, time=None):
    return AgentState(device="d", slots=(slot, Slot(name="b")), active="a", recalls=recalls, floors=Floors(time=time))


def recall(digest=MODEL, *, days=0.0, fallback="previous"):
    return Recall(digest=digest, deadline=NOW + timedelta(days=days), reason="it hallucinates", fallback=fallback)


@pytest.mark.parametrize("digest", [MODEL, MANIFEST])
def test_recall_of_model_or_manifest_counts_from_its_deadline_on(digest):
    state = state_with(recall(digest, days=1, fallback="abstain"))
    assert find_ban(state, SLOT, NOW) is None
    ban = find_ban(state, SLOT, NOW + timedelta(days=1))
    assert (ban.kind, ban.fallback, ban.code) == ("recalled", "abstain", "release.recalled")
    assert "it hallucinates" in ban.reason


def test_recall_of_another_model_is_nothing_to_us():
    assert find_ban(state_with(recall(digest_bytes(b"other"))), SLOT, NOW + timedelta(days=9)) is None


def test_clock_set_back_does_not_end_a_recall():
    state = state_with(recall(days=-1), time=NOW)
    assert find_ban(state, SLOT, datetime(1970, 1, 1, tzinfo=UTC)).kind == "recalled"


def test_validity_ends_at_its_moment():
    slot = msgspec.structs.replace(SLOT, valid_until=NOW, fallback="previous")
    assert find_ban(state_with(slot=slot), slot, NOW - timedelta(seconds=1)) is None
    ban = find_ban(state_with(slot=slot), slot, NOW)
    assert (ban.kind, ban.fallback) == ("expired", "previous")


def test_recall_weighs_more_than_validity():
    slot = msgspec.structs.replace(SLOT, valid_until=NOW, fallback="report")
    assert find_ban(state_with(recall(fallback="abstain"), slot=slot), slot, NOW).fallback == "abstain"


def test_recalled_release_is_not_chosen_even_before_its_deadline():
    info = ReleaseInfo(
        name="m", version="2.0", channel="production", counter=4, published_at=NOW, installed_bytes=1, runtimes=("onnxruntime",)
    )
    release = Release(info=info, manifest_path="models/m/2.0/manifest.json", manifest_digest=MANIFEST, manifest_size_bytes=1)
    empty = AgentState(device="d")
    assert choose_release(empty, [release], model="m", channel="production") is release
    barred = msgspec.structs.replace(empty, recalls=(recall(MANIFEST, days=30),))
    assert choose_release(barred, [release], model="m", channel="production") is None
