"""Pruning: what must stay stays, what nobody needs goes, and a power cut leaves files too many, never one too few."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from registry_world import NOW, Registry
from releases import linear_model, tree_digests

from edgekit.bundle.layout import blob_name
from edgekit.cli.lineage_tree import draw, tree_of
from edgekit.errors import RepositoryError, UsageError
from edgekit.repository import audit
from edgekit.repository import prune as prune_module
from edgekit.repository.ceremony import delegate, refresh_repository, repository_status, sign_pending
from edgekit.repository.lineage import trace
from edgekit.repository.prune import Policy, choose_kept, prune
from edgekit.repository.publishing import check_repository, recall, rollback
from edgekit.repository.store import Store
from edgekit.schema.release import DeltaRef, Release, ReleaseInfo

DAY = timedelta(days=1)
TODAY = datetime.now(UTC).replace(microsecond=0)
"""Files are as old as the test, unless it makes them older, so here the clock is the real one."""
BORN = TODAY - timedelta(days=100)


def digest(text: str) -> str:
    return "sha256:" + text.encode().hex().rjust(64, "0")


def release(version, counter, *, channel="production", name="kws", days=200, parent="", deltas=()):
    info = ReleaseInfo(
        name=name,
        version=version,
        channel=channel,
        counter=counter,
        published_at=NOW - timedelta(days=days),
        installed_bytes=1,
        runtimes=("onnxruntime",),
        parent=parent,
        deltas=tuple(deltas),
    )
    path = f"models/{name}/{version}/{channel}/manifest.json"
    return Release(info=info, manifest_path=path, manifest_digest=digest(f"{name}{version}"), manifest_size_bytes=1)


def delta(base, target):
    return DeltaRef(base=digest(base), target=digest(target), digest=digest(base + target), size_bytes=1, codec="tsub1")


def kept(releases, *, blobs=None, **policy):
    blobs_of = (
        {each.manifest_path: frozenset({digest(f"m{each.info.version}")}) for each in releases} if blobs is None else blobs
    )
    found = choose_kept(releases, Policy(**({"keep": 1, "keep_days": 0} | policy)), blobs_of=blobs_of, now=NOW)
    return {(each.info.name, each.info.version, each.info.channel) for each in releases if each.manifest_path in found}


# --- which releases stay


def test_newest_of_each_channel_and_model_stays():
    row = [release("1", 1), release("2", 2), release("1", 3, channel="dev"), release("1", 1, name="cam")]
    assert kept(row) == {("kws", "2", "production"), ("kws", "1", "dev"), ("cam", "1", "production")}


def test_what_a_rollback_goes_back_to_stays():
    row = [release("1", 1), release("2", 2), release("3", 3, parent="kws@1")]
    assert kept(row) == {("kws", "3", "production"), ("kws", "1", "production")}


def test_parent_that_is_on_another_channel_only_stays():
    row = [release("1", 1, channel="dev"), release("2", 2, channel="dev"), release("2", 3, parent="kws@1")]
    assert ("kws", "1", "dev") in kept(row)


def test_newest_few_and_young_ones_stay():
    row = [release(str(number), number, days=100 - 10 * number) for number in range(1, 6)]
    assert {version for _, version, _ in kept(row, keep=2)} == {"5", "4"}
    assert {version for _, version, _ in kept(row, keep_days=75)} == {"5", "4", "3"}


def test_what_a_device_has_stays_on_every_channel():
    row = [release("1", 1), release("1", 2, channel="dev"), release("2", 3), release("2", 4, channel="dev")]
    assert len(kept(row, in_use=frozenset({("kws", "1")}))) == 4
    assert len(kept(row, in_use=frozenset({("cam", "1")}))) == 2


def test_base_of_a_delta_stays_but_not_the_base_of_its_own():
    row = [release("1", 1), release("2", 2, deltas=[delta("m1", "m2")]), release("3", 3, deltas=[delta("m2", "m3")])]
    assert {version for _, version, _ in kept(row)} == {"3", "2"}


@pytest.mark.parametrize("policy", [{"keep": 0}, {"keep_days": -1}])
def test_policy_that_keeps_nothing_is_refused(policy):
    with pytest.raises(UsageError):
        Policy(**policy)


# --- the whole


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Four releases in a row, each with a model of its own."""
    registry = Registry(tmp_path_factory.mktemp("prune") / "w")
    registry.make(is_gated=False, now=BORN)
    for number in range(1, 5):
        registry.publish(f"{number}.0", channel="production", model=linear_model(number), now=BORN)
    refresh(registry, TODAY)
    return registry


def refresh(registry, now):
    refresh_repository(registry.repo, is_targets_too=True, now=now)


@pytest.fixture
def registry(template, tmp_path):
    shutil.copytree(template.folder, tmp_path / "w")
    return Registry(tmp_path / "w")


ONE = Policy(keep=1, keep_days=0)


def files(registry, *folders):
    """What lies in a repository's folders."""
    names = folders or ("blobs", "targets", "signatures")
    return {str(p.relative_to(registry.repo)) for name in names for p in (registry.repo / name).rglob("*") if p.is_file()}


def age(folder, days):
    """Make every file older."""
    for path in folder.rglob("*"):
        if path.is_file():
            moment = (TODAY - days * DAY).timestamp()
            os.utime(path, (moment, moment))


def versions(registry, now=TODAY):
    return {version for version, _ in registry.seen(now=now)}


def test_old_releases_leave_metadata_first_and_disk_then(registry):
    before = files(registry)
    report = prune(registry.repo, ONE, now=TODAY)
    assert [each.info.version for each in report.removed] == ["1.0", "2.0"]
    assert {each.release: each.reason for each in report.kept} == {
        "kws@4.0": "the newest on production",
        "kws@3.0": "a rollback of production goes back to it",
    }
    assert versions(registry) == {"3.0", "4.0"}
    assert check_repository(registry.repo) == ()
    assert {file.path for file in report.files} == before - files(registry)
    assert len([file for file in report.files if file.path.startswith("blobs/")]) == 8
    assert report.size_bytes == sum(file.size_bytes for file in report.files) > 0
    assert not (registry.repo / "targets" / "models" / "kws" / "1.0").exists()
    assert rollback(registry.repo, "kws", reason="test", now=TODAY).info.version == "3.0"
    entry = next(entry for entry in audit.read_log(registry.repo) if entry.action == "prune")
    assert set(entry.details) == {"kws@1.0", "kws@2.0"}


def test_dry_run_says_the_same_and_changes_nothing(registry):
    before = tree_digests(registry.repo)
    planned = prune(registry.repo, ONE, is_dry_run=True, now=TODAY)
    assert tree_digests(registry.repo) == before
    done = prune(registry.repo, ONE, now=TODAY)
    assert msgspec.structs.replace(done, is_dry_run=True) == planned


def test_second_run_finds_nothing(registry):
    prune(registry.repo, ONE, now=TODAY)
    before = tree_digests(registry.repo)
    report = prune(registry.repo, ONE, now=TODAY)
    assert (report.removed, report.files) == ((), ())
    assert tree_digests(registry.repo) == before


def test_what_a_device_has_stays_and_can_be_fetched(registry):
    prune(registry.repo, Policy(keep=1, keep_days=0, in_use=frozenset({("kws", "1.0")})), now=TODAY)
    assert versions(registry) == {"1.0", "3.0", "4.0"}
    assert check_repository(registry.repo) == ()


def test_blob_that_a_release_shares_stays(registry):
    registry.publish("5.0", channel="production", model=linear_model(1), now=TODAY)
    prune(registry.repo, ONE, now=TODAY)
    assert versions(registry) == {"4.0", "5.0"}
    assert check_repository(registry.repo) == ()


def test_power_cut_before_the_files_go_is_made_good(registry, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_module, "_delete", cut)
    with pytest.raises(KeyboardInterrupt):
        prune(registry.repo, ONE, now=TODAY)
    monkeypatch.undo()
    assert versions(registry) == {"3.0", "4.0"}
    assert check_repository(registry.repo) == ()
    age(registry.repo, 2)
    report = prune(registry.repo, ONE, now=TODAY)
    assert len([file for file in report.files if file.path.startswith("blobs/")]) == 8
    assert check_repository(registry.repo) == ()


def test_removal_that_waits_for_signatures_deletes_nothing_yet(tmp_path):
    registry = Registry(tmp_path / "w")
    registry.make(is_gated=False, now=BORN, targets=2, targets_threshold=2)
    far = [str((registry.keys / "targets-2.pem").rename(registry.folder / "far.pem"))]
    for number in range(1, 4):
        registry.publish(f"{number}.0", channel="production", model=linear_model(number), role_keys=far, now=BORN)
    refresh_repository(registry.repo, roles=["targets"], keys=far, now=TODAY)
    before = files(registry)
    report = prune(registry.repo, ONE, now=TODAY)
    assert ([each.info.version for each in report.removed], report.files, len(report.waiting)) == (["1.0"], (), 1)
    again = prune(registry.repo, ONE, now=TODAY)  # does not lose the signature that is there
    assert (len(again.waiting[0].signed), again.waiting[0].version) == (1, report.waiting[0].version)
    assert files(registry) == before
    assert versions(registry) == {"1.0", "2.0", "3.0"}
    sign_pending(registry.repo, keys=far, now=TODAY)
    assert versions(registry) == {"2.0", "3.0"}
    age(registry.repo, 2)
    prune(registry.repo, ONE, now=TODAY)
    assert len(before - files(registry)) == 6
    assert check_repository(registry.repo) == ()


def test_release_that_waits_for_signatures_keeps_its_files(tmp_path):
    registry = Registry(tmp_path / "w")
    registry.make(is_gated=False, now=BORN, targets=2, targets_threshold=2)
    far = [str((registry.keys / "targets-2.pem").rename(registry.folder / "far.pem"))]
    registry.publish("1.0", channel="production", now=BORN)
    age(registry.repo / "blobs", 5)
    assert prune(registry.repo, ONE, now=TODAY).files == ()
    sign_pending(registry.repo, keys=far, now=TODAY)
    assert check_repository(registry.repo) == ()


def test_release_of_a_family_with_its_own_key(registry):
    delegate(registry.repo, "audio", models=["kws*"], new_keys=["generate"], now=TODAY)
    for number in range(5, 8):
        registry.publish(f"{number}.0", channel="production", model=linear_model(number), now=TODAY)
    report = prune(registry.repo, ONE, now=TODAY)
    assert {each.info.version for each in report.removed} >= {"5.0"}
    assert versions(registry) == {"6.0", "7.0"}
    assert check_repository(registry.repo) == ()


def test_old_metadata_goes_when_no_timestamp_leads_to_it(registry):
    moments = [TODAY - 5 * DAY, TODAY - 4 * DAY, TODAY - 3 * DAY]
    for path in registry.repo.glob("metadata/*.json"):
        number = int(path.name.split(".")[0]) if path.name[0].isdigit() else 0
        moment = (moments[0] if number < 4 else moments[1] if number == 4 else moments[2]).timestamp()
        os.utime(path, (moment, moment))
    before = files(registry, "metadata")
    report = prune(registry.repo, Policy(keep=9), now=TODAY)
    chain = Store.open(registry.repo).chain()
    left = files(registry, "metadata")
    assert f"metadata/{chain.targets.version}.targets.json" in left
    assert f"metadata/{chain.snapshot.version}.snapshot.json" in left
    assert "metadata/1.root.json" in left
    assert "metadata/timestamp.json" in left
    assert {file.path for file in report.files} == before - left
    assert {"metadata/1.targets.json", "metadata/1.snapshot.json"} <= before - left
    assert versions(registry) == {"1.0", "2.0", "3.0", "4.0"}
    refresh(registry, TODAY)  # no number is used twice
    assert Store.open(registry.repo).chain().targets.version == chain.targets.version + 1


def test_metadata_that_was_replaced_just_now_stays(registry):
    moment = (TODAY - 5 * DAY).timestamp()
    for path in registry.repo.glob("metadata/*.json"):
        os.utime(path, (moment, moment))
    chain = Store.open(registry.repo).chain()
    refresh_repository(registry.repo, is_targets_too=True, now=TODAY)
    new = [registry.repo / "metadata" / f"{chain.snapshot.version + 1}.snapshot.json"]
    new.append(registry.repo / "metadata" / f"{chain.targets.version + 1}.targets.json")
    for path in new:
        os.utime(path, (TODAY.timestamp(), TODAY.timestamp()))
    prune(registry.repo, Policy(keep=9), now=TODAY)
    left = files(registry, "metadata")
    assert f"metadata/{chain.snapshot.version}.snapshot.json" in left
    assert f"metadata/{chain.targets.version}.targets.json" in left
    assert f"metadata/{chain.targets.version - 1}.targets.json" not in left


def test_stray_files_go_when_they_are_a_day_old_and_foreign_ones_never(registry):
    blobs = registry.repo / "blobs" / "sha256"
    stray, young = blobs / ("a" * 64), blobs / ("b" * 64)
    temporary, foreign = blobs / ".new-x1", blobs / "README"
    for path in (stray, young, temporary, foreign):
        path.write_bytes(b"12345")
    for path in (stray, temporary, foreign):
        os.utime(path, ((TODAY - 2 * DAY).timestamp(),) * 2)
    os.utime(young, (TODAY.timestamp(),) * 2)
    policy = Policy(keep=9)
    report = prune(registry.repo, policy, now=TODAY)
    assert {file.path.rsplit("/")[-1]: file.size_bytes for file in report.files} == {"a" * 64: 5, ".new-x1": 5}
    assert young.is_file()
    assert foreign.is_file()


def test_deny_list_stays_and_older_ones_go(registry):
    recall(registry.repo, "kws@1.0", deadline=TODAY, reason="one", now=TODAY)
    recall(registry.repo, "kws@2.0", deadline=TODAY, reason="two", now=TODAY)
    age(registry.repo / "targets", 2)
    report = prune(registry.repo, Policy(keep=9), now=TODAY)
    assert len([file for file in report.files if file.path.endswith(".recalls.json")]) == 1
    prune(registry.repo, ONE, now=TODAY)  # the releases go, their recalls hold
    assert len(list((registry.repo / "targets").glob("*.recalls.json"))) == 1
    assert len(repository_status(registry.repo, now=TODAY).recalls) == 2


def test_damaged_release_that_stays_stops_the_deleting(registry):
    manifest = next((registry.repo / "targets" / "models" / "kws" / "4.0").rglob("*.manifest.json"))
    manifest.unlink()
    before = files(registry)
    with pytest.raises(RepositoryError) as caught:
        prune(registry.repo, ONE, now=TODAY)
    assert caught.value.code == "repository.damaged"
    assert files(registry) == before


def test_removed_version_cannot_come_back_with_another_content(registry):
    prune(registry.repo, ONE, now=TODAY)
    with pytest.raises(RepositoryError) as caught:
        registry.publish("1.0", channel="production", model=linear_model(9), now=TODAY)
    assert caught.value.code == "repository.version_exists"
    registry.publish("1.0", channel="production", model=linear_model(1), now=TODAY)
    assert "1.0" in versions(registry)


def test_counters_go_on_above_what_was_removed(registry):
    prune(registry.repo, ONE, now=TODAY)
    assert registry.publish("5.0", channel="production", now=TODAY).info.counter == 5


def test_lineage_says_that_a_parent_was_removed(registry):
    prune(registry.repo, ONE, now=TODAY)
    lines = draw(tree_of(trace(registry.repo, "kws", "4.0")))
    assert any("replaced kws@2.0 (removed since)" in line for line in lines)
    assert blob_name(trace(registry.repo, "kws", "4.0").variants[0].model.digest) in files(registry)
