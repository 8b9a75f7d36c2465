from __future__ import annotations

import msgspec
import numpy as np
import pytest
from fleet_world import T0, birth
from sqlalchemy import insert
from starlette.testclient import TestClient

from edgekit.errors import UsageError
from edgekit.fleet import assembly, tables
from edgekit.fleet.access.accounts import Accounts
from edgekit.fleet.access.tokens import ApiTokens
from edgekit.fleet.api import now_ms
from edgekit.fleet.audit import Audit
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.server import make_app
from edgekit.fleet.store import Store
from edgekit.fleet.work import samples as samples_module
from edgekit.fleet.work.orders import LEASE_MS, Work
from edgekit.fleet.work.samples import Samples
from edgekit.fleet.writing import Received
from edgekit.schema.message import InputSample, Label, SampleTensor
from edgekit.schema.work import SamplePage, WorkOrder


@pytest.fixture
def store(database_url):
    store = Store(database_url)
    yield store
    store.close()


def test_one_order_a_model_and_kind_while_it_is_open(store):
    work = Work(store)
    asked = {"kind": "recalibrate", "model": "kws", "actor": "system:alerts"}
    first = work.open(reason="drift", alert_id=3, now_ms=1, **asked)
    assert work.open(reason="again", now_ms=2, **asked).id == first.id
    assert work.open(**(asked | {"model": "vad"}), reason="", now_ms=2).id != first.id
    work.take(first.id, worker="ci", now_ms=3)
    assert work.open(reason="again", now_ms=4, **asked).id == first.id
    work.finish(first.id, worker="ci", is_done=True, result="published 2.1.0", now_ms=5)
    assert work.open(reason="again", now_ms=6, **asked).id != first.id
    actions = [entry.action for entry in Audit(store).page(subject=f"work:{first.id}").entries]
    assert actions == ["work.done", "work.taken", "work.opened"]


def test_order_of_a_dead_worker_goes_to_the_next(store):
    work = Work(store)
    order = work.open(kind="retrain", model="kws", reason="", actor="operator", now_ms=0)
    work.take(order.id, worker="one", now_ms=0)
    with pytest.raises(UsageError, match="is taken by one"):
        work.take(order.id, worker="two", now_ms=LEASE_MS - 1)
    work.take(order.id, worker="one", now_ms=LEASE_MS - 1)  # it is at it still
    with pytest.raises(UsageError, match="is taken by one"):
        work.take(order.id, worker="two", now_ms=2 * LEASE_MS - 2)
    assert work.take(order.id, worker="two", now_ms=2 * LEASE_MS).worker == "two"
    with pytest.raises(UsageError, match="not one's"):
        work.finish(order.id, worker="one", is_done=True, result="", now_ms=0)


def test_order_refused(store):
    work = Work(store)
    with pytest.raises(UsageError, match="for one model"):
        work.open(kind="recall", model="", reason="", actor="operator", now_ms=0)
    with pytest.raises(UsageError, match="no such order"):
        work.take(9, worker="one", now_ms=0)


def sample(seq: int, prediction: str, value: float) -> InputSample:
    tensor = SampleTensor(name="x", dtype="float32", shape=(1, 2), data=np.array([[value, 0]], np.float32).tobytes())
    return InputSample(
        boot=7, seq=seq, time_ms=T0 + seq, model_digest="ab" * 6, prediction_id=prediction, tensors=(tensor,), predicted="a"
    )


@pytest.fixture
def sampled(store):
    batch = []
    for device in ("cam-1", "cam-2"):
        batch.append((device, birth()))
        batch += [(device, sample(10 + n, f"{device}-{n}", n)) for n in range(5)]
        # the label is corrected later, and the correction comes first
        for seq, time_ms, label in ((51, T0 + 9, "b"), (50, T0, "z")):
            made = Label(boot=7, seq=seq, time_ms=time_ms, model_digest="ab" * 6, prediction_id=f"{device}-2", label=label)
            batch.append((device, made))
    store.apply([Received(site="lab", device=device, message=message, received_ms=T0) for device, message in batch])
    facts = {"version": "1", "counter": 1, "manifest_digest": "sha256:" + "cd" * 32, "status": "active"}
    with store.write() as connection:
        connection.execute(insert(tables.device_models).values(device_id=1, model="kws", model_digest="ab" * 6, **facts))
    return Samples(store)


def test_samples_come_page_by_page_with_their_labels(sampled):
    found, after = [], ""
    while True:
        page = sampled.page(model="kws", after=after, limit=3)
        found += page.samples
        after = page.next
        if not after:
            break
        assert len(page.samples) == 3
    assert len({item.prediction_id for item in found}) == len(found) == 10
    assert {item.prediction_id for item in found if item.label == "b"} == {"cam-1-2", "cam-2-2"}
    values = [np.frombuffer(item.tensors[0].data, np.float32)[0] for item in found if item.device == "cam-1"]
    assert values == [0, 1, 2, 3, 4]
    assert len(sampled.page(since_ms=T0 + 13).samples) == 4
    assert sampled.page(model="vad").samples == ()


def test_samples_counted(sampled):
    (count,) = sampled.counts()
    assert (count.model, count.samples, count.labelled, count.last_ms) == ("kws", 10, 2, T0 + 14)


def test_page_travels(sampled):
    page = sampled.page(limit=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(page), type=type(page)) == page


def test_page_ends_before_it_is_too_large(sampled, monkeypatch):
    monkeypatch.setattr(samples_module, "MAX_PAGE_BYTES", 1)
    found, after = [], ""
    while True:
        page = sampled.page(after=after)
        assert len(page.samples) == 1
        found += page.samples
        after = page.next
        if not after:
            break
    assert len({item.prediction_id for item in found}) == 10


# --- over HTTP


@pytest.fixture
def people(sampled, store):
    """A client, and a header for each role."""
    Accounts(store).add("lee", role="admin", password="correct horse battery", actor="local", now_ms=now_ms())
    tokens = ApiTokens(store)
    headers = {
        role: {"Authorization": f"Bearer {tokens.create(role, role=role, days=1, actor='lee', now_ms=now_ms()).token}"}
        for role in ("viewer", "operator")
    }
    services = assembly.assemble(FleetConfig(), store)
    return TestClient(make_app(store, None, services=services), base_url="http://127.0.0.1"), headers


def test_viewer_sees_counts_and_no_sample(people, store):
    client, who = people
    (count,) = client.get("/api/v1/samples/counts", headers=who["viewer"]).json()
    assert (count["model"], count["samples"], count["labelled"], count["first_ms"]) == ("kws", 10, 2, T0 + 10)
    assert client.get("/api/v1/samples?model=kws", headers=who["viewer"]).status_code == 403
    assert client.get("/api/v1/samples?model=kws").status_code == 401
    assert not [entry for entry in Audit(store).page().entries if entry.action == "samples.exported"]


def test_operator_takes_samples_and_that_is_written_down(people, store):
    client, who = people
    first = client.get("/api/v1/samples?model=kws&limit=6", headers=who["operator"])
    assert first.headers["cache-control"] == "no-store"
    page = msgspec.msgpack.decode(first.content, type=SamplePage)
    rest = client.get(f"/api/v1/samples?model=kws&limit=6&after={page.next}", headers=who["operator"])
    assert len(page.samples) + len(msgspec.msgpack.decode(rest.content, type=SamplePage).samples) == 10
    exports = [entry for entry in Audit(store).page(subject="model:kws").entries if entry.action == "samples.exported"]
    assert len(exports) == 1
    assert "operator" in exports[0].actor


def test_order_is_carried_out_over_http(people, store):
    client, who = people
    asked = {"kind": "recalibrate", "model": "kws", "reason": "by hand"}
    assert client.post("/api/v1/work", json=asked, headers=who["viewer"]).status_code == 403
    made = msgspec.json.decode(client.post("/api/v1/work", json=asked, headers=who["operator"]).content, type=WorkOrder)
    place = f"/api/v1/work/{made.id}"
    assert client.post(f"{place}/take", json={"worker": "ci:1"}, headers=who["viewer"]).status_code == 403
    assert client.post(f"{place}/take", json={"worker": ""}, headers=who["operator"]).status_code == 400
    assert client.post(f"{place}/take", json={"worker": "ci:1"}, headers=who["operator"]).json()["state"] == "taken"
    assert client.post(f"{place}/take", json={"worker": "ci:2"}, headers=who["operator"]).status_code == 409
    done = {"worker": "ci:1", "result": "kws@2 on staging"}
    assert client.post(f"{place}/finish", json=done, headers=who["operator"]).json()["state"] == "done"
    assert client.get("/api/v1/work?state=done", headers=who["viewer"]).json()[0]["result"] == "kws@2 on staging"
    assert client.get("/api/v1/work/99", headers=who["viewer"]).status_code == 404
    entries = Audit(store).page(subject=f"work:{made.id}").entries
    assert [entry.action for entry in entries] == ["work.done", "work.taken", "work.opened"]
    assert all("operator" in entry.actor for entry in entries)
    assert entries[0].fields == {"worker": "ci:1"}
