"""Keys of several people: thresholds, detached signatures, rotation, revocation, delegation; each seen by a device."""

from __future__ import annotations

import json
import shutil
import stat
from datetime import UTC, datetime, timedelta

import pytest
from forging import forge, forge_online
from releases import tiny_bundle, tree_digests

from edgekit.errors import TrustError, UsageError
from edgekit.repository import audit
from edgekit.repository.ceremony import (
    KeyPlan,
    accept_cut_log,
    delegate,
    diagnose,
    export_pending,
    init_repository,
    merge_detached,
    refresh_repository,
    repository_status,
    revoke,
    rotate,
    sign_detached,
    sign_pending,
    undelegate,
)
from edgekit.repository.publishing import add_publisher, publish
from edgekit.repository.server import RepositoryServer
from edgekit.repository.store import Store
from edgekit.schema.state import Floors
from edgekit.trust.keys import save_public_key
from edgekit.trust.repository_client import TrustedRepository
from edgekit.trust.signer import generate_signer, load_signer, save_signer

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


class Place:
    """Three root keys of which two sign, two targets keys of which both do; one of each is carried elsewhere."""

    def __init__(self, folder):
        self.folder, self.repo, self.keys = folder, folder / "repo", folder / "keys"
        self.elsewhere = folder / "elsewhere"

    def make(self):
        plan = KeyPlan(root=3, root_threshold=2, targets=2, targets_threshold=2)
        init_repository(self.repo, keys_dir=self.keys, keys=plan, now=NOW)
        self.elsewhere.mkdir()
        for name in ("root-2", "root-3", "targets-2"):
            (self.keys / f"{name}.pem").rename(self.elsewhere / f"{name}.pem")
        publisher = generate_signer()
        save_signer(publisher, self.folder / "publisher.pem")
        save_public_key(publisher.public_key, self.folder / "publisher.pub")
        add_publisher(self.repo, self.folder / "publisher.pub")
        shutil.copy(self.repo / "metadata" / "1.root.json", self.folder / "provisioned.json")

    def far(self, *names):
        return [str(self.elsewhere / f"{name}.pem") for name in names]

    def publish(self, version="1.0.0", *, name="kws", **changes):
        signer = load_signer(self.folder / "publisher.pem")
        path = tiny_bundle(self.folder / f"{name}-{version}.edgekit", signer, version=version, name=name)
        return publish(self.repo, path, now=NOW, **changes)

    def device(self, *, floors=None, model="", now=NOW):
        """What a device sees that was provisioned with the first root."""
        with RepositoryServer(self.repo, "127.0.0.1", 0) as server:
            root = (self.folder / "provisioned.json").read_bytes()
            device = TrustedRepository(
                self.folder / "cache", server.url, root=root, floors=floors or Floors(), now=now, model=model
            )
            return device.refresh()

    def seen(self, **changes):
        return {(r.info.name, r.info.version): r.info.counter for r in self.device(**changes).releases}

    def waiting(self):
        return {item.role: item for item in repository_status(self.repo, now=NOW).waiting}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("ceremony") / "w")
    place.folder.mkdir()
    place.make()
    return place


@pytest.fixture
def place(template, tmp_path):
    shutil.copytree(template.folder, tmp_path / "w")
    return Place(tmp_path / "w")


def test_release_waits_for_the_second_signature(place):
    before = tree_digests(place.repo / "metadata")
    release = place.publish()
    assert release.info.counter == 1
    assert tree_digests(place.repo / "metadata") == before
    assert place.seen() == {}
    item = place.waiting()["targets"]
    assert (item.missing, len(item.signed), len(item.unsigned)) == (1, 1, 1)
    roles, done = sign_pending(place.repo, "targets", keys=place.far("targets-2"), now=NOW)
    assert (roles, done.published, done.waiting) == (("targets",), ("targets",), ())
    assert place.seen() == {("kws", "1.0.0"): 1}
    assert place.waiting() == {}


def test_second_release_while_the_first_waits_keeps_both(place):
    place.publish()
    place.publish("1.1.0")
    item = place.waiting()["targets"]
    assert (item.version, item.missing) == (2, 1)
    sign_pending(place.repo, keys=place.far("targets-2"), now=NOW)
    assert place.seen() == {("kws", "1.0.0"): 1, ("kws", "1.1.0"): 2}


def test_detached_signature_over_a_file(place):
    place.publish()
    file = place.folder / "usb.json"
    words = export_pending(place.repo, "targets", file)
    assert "adds models/kws/1.0.0/production/manifest.json" in words
    sign_detached(file, place.far("targets-2"))
    role, done = merge_detached(place.repo, file, now=NOW)
    assert (role, done.published) == ("targets", ("targets",))
    assert place.seen() == {("kws", "1.0.0"): 1}


def test_detached_file_that_was_changed_or_outdated_is_refused(place):
    place.publish()
    file = place.folder / "usb.json"
    export_pending(place.repo, "targets", file)
    record = json.loads(file.read_bytes())
    record["signed"]["targets"]["models/evil/1/production/manifest.json"] = {"length": 1, "hashes": {"sha256": "0" * 64}}
    changed = place.folder / "changed.json"
    changed.write_text(json.dumps(record))
    sign_detached(changed, place.far("targets-2"))
    with pytest.raises(TrustError) as caught:
        merge_detached(place.repo, changed, now=NOW)
    assert caught.value.code == "trust.other_content"
    place.publish("1.1.0")  # the change went on meanwhile
    sign_detached(file, place.far("targets-2"))
    with pytest.raises(TrustError) as caught:
        merge_detached(place.repo, file, now=NOW)
    assert caught.value.code == "trust.other_content"
    assert place.seen() == {}


def test_signature_by_a_stranger_brings_nothing(place):
    place.publish()
    save_signer(generate_signer(), place.folder / "stranger.pem")
    with pytest.raises(TrustError) as caught:
        sign_pending(place.repo, keys=[str(place.folder / "stranger.pem")], now=NOW)
    assert caught.value.code == "trust.foreign_key"
    file = place.folder / "usb.json"
    export_pending(place.repo, "targets", file)
    sign_detached(file, [str(place.folder / "stranger.pem")])
    with pytest.raises(TrustError) as caught:
        merge_detached(place.repo, file, now=NOW)
    assert caught.value.code == "trust.foreign_key"


def test_same_key_twice_does_not_reach_the_threshold(place):
    place.publish()
    keys = [str(place.keys / "targets-1.pem")] * 2
    _, done = sign_pending(place.repo, keys=keys, now=NOW)
    assert done.published == ()
    assert place.waiting()["targets"].missing == 1


@pytest.mark.parametrize("role", ["snapshot", "timestamp"])
def test_rotate_an_online_key(place, role):
    place.publish(role_keys=place.far("targets-2"))
    before = place.device().floors
    done = rotate(place.repo, role, old=role, new="generate", now=NOW)
    assert (done.published, done.waiting[0].missing) == ((), 1)
    assert place.device(floors=before).versions.root == 1
    sign_pending(place.repo, "root", keys=place.far("root-3"), now=NOW)
    (place.keys / f"{role}.pem").unlink()
    result = place.device(floors=before)
    assert result.versions.root == 2
    assert len(result.releases) == 1
    refresh_repository(place.repo, now=NOW)
    assert place.device(floors=result.floors).versions.timestamp == result.versions.timestamp + 1


def test_rotate_a_targets_key_waits_for_the_new_key(place):
    """The new root may only become visible together with targets that its keys signed."""
    place.publish(role_keys=place.far("targets-2"))
    carol = generate_signer()
    save_signer(carol, place.elsewhere / "carol.pem")
    save_public_key(carol.public_key, place.folder / "carol.pub")
    rotate(place.repo, "targets", old="targets-2", new=str(place.folder / "carol.pub"), now=NOW)
    sign_pending(place.repo, "root", keys=place.far("root-2"), now=NOW)
    waiting = place.waiting()
    assert waiting["root"].missing == 0
    assert waiting["targets"].missing == 1
    assert place.device().versions.root == 1
    with pytest.raises(TrustError):  # the old key does not count any more
        sign_pending(place.repo, "targets", keys=place.far("targets-2"), now=NOW)
    _, done = sign_pending(place.repo, "targets", keys=place.far("carol"), now=NOW)
    assert done.published == ("root", "targets")
    result = place.device()
    assert (result.versions.root, len(result.releases)) == (2, 1)


def test_rotate_the_root_needs_old_and_new_threshold(place):
    rotate(place.repo, "root", old="root-1", new="generate", now=NOW)
    item = place.waiting()["root"]
    assert item.missing == 1  # root-1 signed for the old root, the generated one for the new: one more each
    sign_pending(place.repo, "root", keys=place.far("root-2"), now=NOW)
    assert place.waiting() == {}
    assert place.device().versions.root == 2
    place.publish(role_keys=place.far("targets-2"))
    assert place.seen() == {("kws", "1.0.0"): 1}


def test_revoked_key_signs_nothing_more(place):
    place.publish(role_keys=place.far("targets-2"))
    stolen = [load_signer(place.keys / "targets-1.pem"), load_signer(place.elsewhere / "targets-2.pem")]
    before = Store.open(place.repo).chain()
    rotate(place.repo, "targets", new="generate", keys=place.far("root-2", "targets-2"), now=NOW)
    done = revoke(place.repo, "targets-2", reason="stolen", keys=place.far("root-2"), now=NOW)
    assert done.waiting == ()
    assert place.seen() == {("kws", "1.0.0"): 1}
    before.targets.version = 50
    data = forge(place.repo, before.targets, "50.targets.json", stolen)
    chain = Store.open(place.repo).chain()
    chain.targets.version = 50
    forge_online(place.repo, chain, data)
    with pytest.raises(TrustError) as caught:
        place.device()
    assert caught.value.code == "trust.signature"


def test_revocation_that_makes_a_threshold_unreachable_is_refused(place):
    before = tree_digests(place.repo)
    with pytest.raises(UsageError) as caught:
        revoke(place.repo, "targets-2", reason="lost", now=NOW)
    assert caught.value.code == "trust.threshold"
    assert tree_digests(place.repo) == before


def test_duplicate_key_material_is_refused(place):
    with pytest.raises(TrustError) as caught:
        rotate(place.repo, "targets", new=str(place.keys / "targets-1.pub"), now=NOW)
    assert caught.value.code == "trust.duplicate_key"
    save_public_key(load_signer(place.keys / "targets-1.pem").public_key, place.folder / "alias.pub")
    with pytest.raises(TrustError) as caught:
        rotate(place.repo, "targets", new=str(place.folder / "alias.pub"), now=NOW)
    assert caught.value.code == "trust.duplicate_key"


def test_family_of_models_signed_by_its_own_key(place):
    done = delegate(place.repo, "audio", models=["kws*"], new_keys=["generate"], keys=place.far("targets-2"), now=NOW)
    assert set(done.published) == {"targets", "audio"}
    place.publish()  # no targets key from elsewhere is needed
    place.publish("1.0.0", name="vision")
    assert place.seen() == {("kws", "1.0.0"): 1}
    assert set(place.waiting()) == {"targets"}
    sign_pending(place.repo, keys=place.far("targets-2"), now=NOW)
    assert place.seen() == {("kws", "1.0.0"): 1, ("vision", "1.0.0"): 1}
    assert place.seen(model="vision") == {("vision", "1.0.0"): 1}


def test_family_key_cannot_sign_another_family(place):
    delegate(place.repo, "audio", models=["kws*"], new_keys=["generate"], keys=place.far("targets-2"), now=NOW)
    place.publish()
    chain = Store.open(place.repo).chain()
    role = chain.delegated["audio"]
    path, target = next(iter(role.targets.items()))
    target.unrecognized_fields["custom"]["name"] = "vision"
    role.targets[path.replace("kws", "vision")] = target
    role.version += 1
    data = forge(place.repo, role, f"{role.version}.audio.json", [load_signer(place.keys / "audio-1.pem")])
    from tuf.api.metadata import MetaFile

    chain.snapshot.meta["audio.json"] = MetaFile.from_data(role.version, data, ["sha256"])
    targets = (place.repo / "metadata" / f"{chain.targets.version}.targets.json").read_bytes()
    keys = [load_signer(place.keys / f"{name}.pem") for name in ("snapshot", "timestamp")]
    forge_online(place.repo, chain, targets, signers=keys)
    assert ("vision", "1.0.0") not in place.seen()


def test_delegated_metadata_never_goes_back(place):
    delegate(place.repo, "audio", models=["kws*"], new_keys=["generate"], keys=place.far("targets-2"), now=NOW)
    place.publish()
    old = place.folder / "old"
    shutil.copytree(place.repo, old)
    place.publish("2.0.0")
    floors = place.device().floors
    shutil.rmtree(place.folder / "cache")
    repo, place.repo = place.repo, old
    lowered = Floors(root=1, delegated=floors.delegated)  # snapshot and targets floors lost: the role's own still holds
    with pytest.raises(TrustError, match="audio version"):
        place.device(floors=lowered)
    place.repo = repo


def test_new_keys_of_a_family_begin_anew(place):
    delegate(place.repo, "audio", models=["kws*"], new_keys=["generate"], keys=place.far("targets-2"), now=NOW)
    place.publish()
    floors = place.device().floors
    assert list(floors.delegated.values()) == [2]
    done = rotate(place.repo, "audio", old="audio-1", new="generate", keys=place.far("targets-2"), now=NOW)
    assert set(done.published) == {"audio", "targets"}
    (place.keys / "audio-1.pem").unlink()
    later = place.device(floors=floors)
    assert later.floors.delegated.keys().isdisjoint(floors.delegated)
    place.publish("2.0.0")
    assert place.seen() == {("kws", "1.0.0"): 1, ("kws", "2.0.0"): 2}


def test_delegation_taken_back_offers_nothing(place):
    delegate(place.repo, "audio", models=["kws*"], new_keys=["generate"], keys=place.far("targets-2"), now=NOW)
    place.publish()
    undelegate(place.repo, "audio", keys=place.far("targets-2"), now=NOW)
    assert place.seen() == {}


def test_delegation_waits_for_its_keys(place):
    dora = generate_signer()
    save_signer(dora, place.elsewhere / "dora.pem")
    save_public_key(dora.public_key, place.folder / "dora.pub")
    done = delegate(
        place.repo, "audio", models=["kws*"], new_keys=[str(place.folder / "dora.pub")], keys=place.far("targets-2"), now=NOW
    )
    assert done.published == ()
    assert {item.role: item.missing for item in done.waiting} == {"targets": 0, "audio": 1}
    assert "audio" in next(item.reason for item in done.waiting if item.role == "targets")
    _, done = sign_pending(place.repo, "audio", keys=place.far("dora"), now=NOW)
    assert set(done.published) == {"audio", "targets"}
    assert place.seen() == {}


def test_server_without_the_targets_keys_publishes_what_was_signed_elsewhere(place):
    """Two machines: releases are signed where no online key is, and made visible where no targets key is."""
    online = place.folder / "online"
    online.mkdir()
    for role in ("snapshot", "timestamp"):
        (place.keys / f"{role}.pem").rename(online / f"{role}.pem")
    with pytest.raises(UsageError) as caught:
        place.publish(role_keys=place.far("targets-2"))
    assert caught.value.code == "repository.no_key"
    assert place.waiting()["targets"].missing == 0
    (place.keys / "targets-1.pem").unlink()
    for role in ("snapshot", "timestamp"):
        (online / f"{role}.pem").rename(place.keys / f"{role}.pem")
    refresh_repository(place.repo, now=NOW)
    assert place.seen() == {("kws", "1.0.0"): 1}


def test_new_expiry_of_an_offline_role(place):
    later = NOW + timedelta(days=80)
    status = refresh_repository(place.repo, roles=["targets", "root"], now=later)
    assert {item.role for item in status.waiting} == {"targets", "root"}
    sign_pending(place.repo, keys=place.far("targets-2", "root-2"), now=later)
    expires = {role.role: role.expires_at for role in repository_status(place.repo, now=later).roles}
    assert expires["targets"] == later + timedelta(days=90)
    assert expires["root"] == later + timedelta(days=365)
    assert place.device(now=later).versions.root == 2


def test_interrupted_publication_of_a_root_is_gone_on_with(place, monkeypatch):
    """The power is cut between the new root, with a new timestamp key, and the timestamp that it signs."""
    from edgekit.repository import changes

    rotate(place.repo, "timestamp", old="timestamp", new="generate", now=NOW)
    original = changes.Workbench._sign_online

    def cut(self, signed, signers):
        if signed.type == "timestamp":
            raise KeyboardInterrupt
        return original(self, signed, signers)

    monkeypatch.setattr(changes.Workbench, "_sign_online", cut)
    with pytest.raises(KeyboardInterrupt):
        sign_pending(place.repo, "root", keys=place.far("root-2"), now=NOW)
    monkeypatch.undo()
    assert (place.repo / "metadata" / "2.root.json").is_file()
    refresh_repository(place.repo, now=NOW)
    assert place.device().versions.root == 2
    assert place.waiting() == {}


def test_root_that_was_exchanged_for_another_valid_looking_one(place):
    """Somebody who can write the served folder, without our keys, brings a second version signed by keys of their own."""
    other = Place(place.folder / "other")
    other.folder.mkdir()
    other.make()
    shutil.copy(other.repo / "metadata" / "1.root.json", place.repo / "metadata" / "2.root.json")
    with pytest.raises(TrustError) as caught:
        place.publish()
    assert caught.value.code == "repository.foreign_metadata"


def test_doctor_on_a_healthy_and_on_an_ailing_repository(place):
    assert [fault for fault in diagnose(place.repo, now=NOW) if fault.level == "fault"] == []
    late = NOW + timedelta(days=80)
    faults = " ".join(fault.what for fault in diagnose(place.repo, now=late) if fault.level == "fault")
    assert "targets expires in 10 d" in faults
    assert "timestamp expired" in faults
    assert "root" not in faults
    (place.keys / "snapshot.pem").chmod(0o640)
    shutil.copy(place.keys / "targets-1.pem", place.repo / "targets" / "oops.pem")
    (place.keys / "root.json").unlink()
    faults = " ".join(fault.what for fault in diagnose(place.repo, now=NOW) if fault.level == "fault")
    assert "mode 0640" in faults
    assert "served" in faults
    assert "copy of the root" in faults


def test_audit_log_tells_and_cannot_be_cut(place):
    place.publish(role_keys=place.far("targets-2"))
    path = place.repo / audit.AUDIT_FILE
    entries = audit.read_log(place.repo)
    assert [entry.action for entry in entries] == ["init", "trust publisher", "publish"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [fault for fault in diagnose(place.repo, now=NOW) if "audit log" in fault.what] == []
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert "ends with entry 2" in " ".join(fault.what for fault in diagnose(place.repo, now=NOW))
    path.write_bytes(lines[0] + lines[1].replace(b"trust publisher", b"trust nobody   ") + lines[2])
    with pytest.raises(TrustError) as caught:
        audit.read_log(place.repo)
    assert caught.value.code == "audit.broken"


def test_nothing_goes_on_from_an_audit_log_that_lost_its_end(place):
    place.publish(role_keys=place.far("targets-2"))
    path = place.repo / audit.AUDIT_FILE
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:-1]))
    save_public_key(generate_signer().public_key, place.folder / "other.pub")
    before = tree_digests(place.repo)
    with pytest.raises(TrustError) as caught:
        add_publisher(place.repo, place.folder / "other.pub")
    assert caught.value.code == "audit.cut"
    assert "--accept-loss" in caught.value.hint
    with pytest.raises(TrustError, match="ends with entry 2"):
        place.publish("2.0.0", role_keys=place.far("targets-2"))
    assert tree_digests(place.repo) == before
    refresh_repository(place.repo, now=NOW)  # devices do not lose their repository with its books

    entry = accept_cut_log(place.repo, "the disk was full", now=NOW)
    assert (entry.seq, entry.action, entry.details["known"]) == (3, "log cut", "3")
    assert [fault for fault in diagnose(place.repo, now=NOW) if "audit log" in fault.what] == []
    place.publish("2.0.0", role_keys=place.far("targets-2"))
    with pytest.raises(UsageError) as refused:
        accept_cut_log(place.repo, "again", now=NOW)
    assert refused.value.code == "audit.whole"


def test_a_loss_is_accepted_only_where_it_is_one(place):
    place.publish(role_keys=place.far("targets-2"))
    (place.repo / audit.AUDIT_FILE).unlink()
    for action in ("init", "trust publisher", "something else"):
        audit.append(place.repo, action, "kws@1.0.0", now=NOW)
    with pytest.raises(TrustError) as caught:
        accept_cut_log(place.repo, "a rewritten log", now=NOW)
    assert caught.value.code == "audit.broken"


def test_audit_log_rewritten_as_a_whole_does_not_fit_the_snapshot(place):
    place.publish(role_keys=place.far("targets-2"))
    (place.repo / audit.AUDIT_FILE).unlink()
    for action in ("init", "trust publisher", "something else"):
        audit.append(place.repo, action, "kws@1.0.0", now=NOW)
    assert "not the one that the signed snapshot knows" in " ".join(fault.what for fault in diagnose(place.repo, now=NOW))


def test_audit_log_torn_by_a_power_cut_goes_on(place):
    path = place.repo / audit.AUDIT_FILE
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq":3,"at"')
    audit.append(place.repo, "publish", "kws@1", now=NOW)
    assert [entry.seq for entry in audit.read_log(place.repo)] == [1, 2, 3]


def test_thresholds_that_cannot_be_are_refused(tmp_path):
    for plan in (KeyPlan(root=2, root_threshold=3), KeyPlan(targets=1, targets_threshold=2)):
        with pytest.raises(UsageError) as caught:
            init_repository(tmp_path / "r", keys=plan)
        assert caught.value.code == "trust.threshold"
    assert not (tmp_path / "r").exists()


def test_targets_with_one_of_two_signatures_are_refused_and_later_ones_accepted(place):
    """A thief of one targets key and of the online keys; then the two owners publish the same version properly."""
    shutil.copytree(place.repo, place.folder / "honest")
    chain = Store.open(place.repo).chain()
    chain.targets.version = 2
    one = [load_signer(place.keys / "targets-1.pem")]
    data = forge(place.repo, chain.targets, "2.targets.json", one)
    forge_online(place.repo, chain, data)
    with pytest.raises(TrustError) as caught:
        place.device()
    assert caught.value.code == "trust.signature"
    shutil.rmtree(place.repo)
    (place.folder / "honest").rename(place.repo)
    place.publish(role_keys=place.far("targets-2"))
    refresh_repository(place.repo, now=NOW)  # above the timestamp that the thief signed
    result = place.device()
    assert (result.versions.targets, len(result.releases)) == (2, 1)


@pytest.mark.parametrize(("old", "is_accepted"), [(["root-2"], False), (["root-1", "root-2"], True)])
def test_root_signed_by_new_keys_and_some_old_ones(place, old, is_accepted):
    root = Store.open(place.repo).chain().root
    new = [generate_signer(), generate_signer()]
    root.version = 2
    for keyid in list(root.roles["root"].keyids):
        root.revoke_key(keyid, "root")
    for signer in new:
        root.add_key(signer.tuf_signer().public_key, "root")
    mine = {path.stem: load_signer(path) for folder in (place.keys, place.elsewhere) for path in folder.glob("root-*.pem")}
    forge(place.repo, root, "2.root.json", [*new, *(mine[name] for name in old)])
    if is_accepted:
        assert place.device().versions.root == 2
    else:
        with pytest.raises(TrustError) as caught:
            place.device()
        assert caught.value.code == "trust.signature"


def test_snapshot_that_leaves_a_delegated_role_out(place):
    """The online keys' thief hides a family's releases; the device must not take that for an empty family."""
    delegate(place.repo, "audio", models=["kws*"], new_keys=["generate"], keys=place.far("targets-2"), now=NOW)
    place.publish()
    chain = Store.open(place.repo).chain()
    del chain.snapshot.meta["audio.json"]
    data = (place.repo / "metadata" / f"{chain.targets.version}.targets.json").read_bytes()
    forge_online(place.repo, chain, data)
    with pytest.raises(TrustError) as caught:
        place.device()
    assert caught.value.code == "trust.metadata"


def test_delegation_taken_back_is_followed_by_a_device_that_knew_it(place):
    delegate(place.repo, "audio", models=["kws*"], new_keys=["generate"], keys=place.far("targets-2"), now=NOW)
    place.publish()
    floors = place.device().floors
    undelegate(place.repo, "audio", keys=place.far("targets-2"), now=NOW)
    later = place.device(floors=floors)
    assert later.releases == ()
    delegate(place.repo, "audio", models=["kws*"], new_keys=["generate"], keys=place.far("targets-2"), now=NOW)
    place.publish("2.0.0")
    assert [release.info.version for release in place.device(floors=later.floors).releases] == ["2.0.0"]
