from __future__ import annotations

import pytest
from fleet_world import T0, birth
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, select

from edgekit.errors import UsageError
from edgekit.fleet import tables
from edgekit.fleet.audit import Audit
from edgekit.fleet.groups import Groups
from edgekit.fleet.selector import KEYS, Selector
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Received

FLEET = {
    ("lab", "cam-1"): ("aarch64", {"camera": "dome"}, ("kws", "1.0.0")),
    ("lab", "cam-2"): ("aarch64", {"camera": "bullet"}, ("kws", "2.0.0")),
    ("office", "cam-1"): ("x86_64", {"camera": "dome", "floor": "2_a"}, ("vad", "2.0.0")),
    ("office", "pump"): ("armv7l", {}, ("kws", "2.0.0")),
}


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "fleet.db"))
    store.apply([Received(site=site, device=device, message=birth(), received_ms=T0) for site, device in FLEET])
    with store.write() as connection:
        for (site, device), (arch, labels, (model, version)) in FLEET.items():
            here = (tables.devices.c.site == site, tables.devices.c.device == device)
            number = connection.execute(select(tables.devices.c.id).where(*here)).scalar_one()
            connection.execute(tables.devices.update().where(*here).values(arch=arch))
            for key, value in labels.items():
                connection.execute(insert(tables.device_labels).values(device_id=number, key=key, value=value))
            facts = {"counter": 1, "model_digest": "ab" * 6, "manifest_digest": "sha256:" + "cd" * 32, "status": "active"}
            connection.execute(insert(tables.device_models).values(device_id=number, model=model, version=version, **facts))
    yield store
    store.close()


def chosen(store, text, dynamic=None):
    row = tables.devices.c
    with store.read() as connection:
        found = connection.execute(select(row.site, row.device).where(Selector.parse(text).clause(dynamic)))
        return sorted(f"{site}/{device}" for site, device in found)


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("", ["lab/cam-1", "lab/cam-2", "office/cam-1", "office/pump"]),
        ("site=lab", ["lab/cam-1", "lab/cam-2"]),
        ("site!=lab", ["office/cam-1", "office/pump"]),
        ("site=lab|office,arch=aarch64", ["lab/cam-1", "lab/cam-2"]),
        ("device=cam-1", ["lab/cam-1", "office/cam-1"]),
        ("device=office/cam-1|lab/cam-2", ["lab/cam-2", "office/cam-1"]),
        ("device=cam-*", ["lab/cam-1", "lab/cam-2", "office/cam-1"]),
        ("device=cam_1", []),
        ("label.camera=dome", ["lab/cam-1", "office/cam-1"]),
        ("label.camera!=dome", ["lab/cam-2", "office/pump"]),
        ("label.floor=2_*", ["office/cam-1"]),
        ("model=kws", ["lab/cam-1", "lab/cam-2", "office/pump"]),
        ("model=kws@2.0.0", ["lab/cam-2", "office/pump"]),
        ("version=2.*", ["lab/cam-2", "office/cam-1", "office/pump"]),
        ("model=kws,version!=1.0.0,arch=aarch64", ["lab/cam-2"]),
    ],
)
def test_selector_chooses(store, text, devices):
    assert chosen(store, text) == devices


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("site", "selector.malformed", "'site' is no condition"),
        ("site=", "selector.malformed", "no condition"),
        ("sit=lab", "selector.key", "sit: no such key"),
        ("label.=x", "selector.key", "no such key"),
        ("site=a," * 40, "selector.malformed", "at most 32"),
        ("x" * 1001, "selector.malformed", "at most 1000"),
    ],
)
def test_selector_refused(text, code, words):
    with pytest.raises(UsageError, match=words) as caught:
        Selector.parse(text)
    assert caught.value.code == code


def test_near_key_is_named():
    with pytest.raises(UsageError) as caught:
        Selector.parse("sit=lab")
    assert '"site"' in caught.value.hint


_values = st.lists(st.text(alphabet="abz09-_*./ ", min_size=1).filter(str.strip), min_size=1, max_size=3)


@given(st.lists(st.tuples(st.sampled_from([*KEYS, "label.a"]), st.sampled_from(["=", "!="]), _values), max_size=5))
def test_canonical_text_reads_back(parts):
    selector = Selector.parse(",".join(f"{key} {sign} {'|'.join(values)}" for key, sign, values in parts))
    assert Selector.parse(str(selector)) == selector


def test_group_as_a_list(store):
    groups = Groups(store)
    groups.put("pilots", devices=["lab/cam-1", "office/pump"], actor="operator", now_ms=T0, note="first")
    assert chosen(store, "group=pilots", groups.dynamic()) == ["lab/cam-1", "office/pump"]
    assert chosen(store, "group!=pilots,site=lab") == ["lab/cam-2"]
    groups.put("pilots", devices=["lab/cam-2"], actor="operator", now_ms=T0)
    assert groups.members("pilots") == (("lab", "cam-2"),)
    assert [(view.name, view.devices) for view in groups.list()] == [("pilots", 1)]
    assert [entry.action for entry in Audit(store).page(subject="group:pilots").entries] == ["group.changed"] * 2


def test_group_by_selector_follows_the_fleet(store):
    groups = Groups(store)
    groups.put("arm", selector="arch=aarch64|armv7l", actor="operator", now_ms=T0)
    groups.put("arm-lab", selector="group=arm,site=lab", actor="operator", now_ms=T0)
    assert [len(groups.members(name)) for name in ("arm", "arm-lab")] == [3, 2]
    store.apply([Received(site="lab", device="new", message=birth(), received_ms=T0)])
    with store.write() as connection:
        connection.execute(tables.devices.update().where(tables.devices.c.device == "new").values(arch="armv7l"))
    assert [len(groups.members(name)) for name in ("arm", "arm-lab")] == [4, 3]


def test_group_in_a_circle(store):
    groups = Groups(store)
    with pytest.raises(UsageError, match="deep"):
        groups.put("self", selector="group=self", actor="operator", now_ms=T0)
    assert groups.list() == ()


def test_group_refused_changes_nothing(store):
    groups = Groups(store)
    groups.put("pilots", devices=["lab/cam-1"], actor="operator", now_ms=T0)
    with pytest.raises(UsageError, match="lab/cam-9"):
        groups.put("pilots", devices=["lab/cam-2", "lab/cam-9"], actor="operator", now_ms=T0)
    assert groups.members("pilots") == (("lab", "cam-1"),)
    with pytest.raises(UsageError, match="not both"):
        groups.put("x", actor="operator", now_ms=T0)
    with pytest.raises(UsageError, match="not a name"):
        groups.put("No!", selector="site=lab", actor="operator", now_ms=T0)


def test_group_removed(store):
    groups = Groups(store)
    groups.put("pilots", devices=["lab/cam-1"], actor="operator", now_ms=T0)
    groups.remove("pilots", actor="operator", now_ms=T0)
    with pytest.raises(UsageError, match="no such group"):
        groups.members("pilots")
    with pytest.raises(UsageError, match="no such group"):
        groups.remove("pilots", actor="operator", now_ms=T0)
