"""Recall and validity on a running agent: out of service in time, offline too, with the declared fallback."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from edgekit.errors import RepositoryError
from edgekit.repository.publishing import publish, recall, rollback
from edgekit.schema.digest import digest_bytes
from tests.agent.world import build_model, wait_for


def now():
    return datetime.now(UTC)


def test_recall_takes_the_model_out_and_the_one_before_serves(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    world.publish("2.0", seed=2)
    agent.wait_served("2.0")
    recall(world.folder, digest_bytes(build_model(2)[0]), deadline=now(), reason="wrong labels")
    agent.wait_served("1.0")
    found = agent.status()["state"]
    assert [refusal["code"] for refusal in found["refusals"]] == ["release.recalled"]
    assert "wrong labels" in found["refusals"][0]["reason"]
    assert agent.infer([0, 0, 0, 0])[0] == 200
    assert agent.stop() == 0
    agent.start()  # and it stays so
    agent.wait_served("1.0")


def test_recall_with_nothing_to_go_back_to_answers_with_the_reason(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    recall(world.folder, "m@1.0", deadline=now(), reason="wrong labels", fallback="previous")
    wait_for(lambda: agent.infer([0, 0, 0, 0])[0] == 503, what="abstaining")
    status, _, body = agent.infer([0, 0, 0, 0])
    assert (status, body["code"]) == (503, "agent.abstains")
    assert "wrong labels" in body["error"]
    assert agent.get("/v2/health/live")[0] == 200
    world.publish("1.1", seed=3)  # the mended one is taken
    agent.wait_served("1.1")


def test_recalled_model_under_a_new_name_is_not_installed(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    world.publish("2.0", seed=2)
    agent.wait_served("2.0")
    recall(world.folder, digest_bytes(build_model(1)[0]), deadline=now() + timedelta(days=1), reason="stolen data")
    with pytest.raises(RepositoryError) as caught:
        rollback(world.folder, "m", to="1.0")
    assert caught.value.code == "repository.recalled"
    assert agent.served() == "2.0"


def test_release_valid_for_a_moment_ends_offline(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    out = world.bundles / "m-1.0.edgekit"
    until = now() + timedelta(seconds=4)
    publish(world.folder, out, keys=[world.signer.public_key], is_again=True, valid_until=until, fallback="abstain")
    agent.wait_status(lambda body: any(slot["valid_until"] for slot in body["state"]["slots"]), what="the new validity")
    world.stop()
    assert agent.infer([0, 0, 0, 0])[0] == 200
    wait_for(lambda: agent.infer([0, 0, 0, 0])[0] == 503, what="the end of validity")
    assert "valid until" in agent.infer([0, 0, 0, 0])[2]["error"]


def test_validity_with_report_goes_on_and_says_so(world, make_agent):
    world.publish("1.0", seed=1)
    publish(
        world.folder,
        world.bundles / "m-1.0.edgekit",
        keys=[world.signer.public_key],
        is_again=True,
        valid_until=now() - timedelta(days=1),
        fallback="report",
    )
    agent = make_agent().start()
    agent.wait_served("1.0")
    wait_for(lambda: agent.logged("event=release_expired"), what="the report")
    assert agent.infer([0, 0, 0, 0])[0] == 200


def test_rollback_by_a_new_counter(world, make_agent):
    world.publish("1.0", seed=1)
    agent = make_agent().start()
    agent.wait_served("1.0")
    world.publish("2.0", seed=2)
    agent.wait_served("2.0")
    release = rollback(world.folder, "m", reason="worse at night")
    assert (release.info.version, release.info.counter) == ("1.0", 3)
    agent.wait_served("1.0")
