"""Power cuts while a bundle or a key is written: the old file, the new one, or none; never a part of one."""

from __future__ import annotations

import shutil

import pytest

from edgekit.bundle.reader import verify_bundle
from edgekit.durable import write_durably
from edgekit.trust.signer import generate_signer, load_signer, save_signer
from tests.crash.crashy_disk import Explorer, Recorder, survivors
from tests.crash.office import scratch_folder
from tests.releases import tiny_bundle

REDUNDANT = {
    # the bundle is read back under this name before it gets its own: only the second name must last
    "folder: sync_folder < write_durably < bundle/writer.py:write_bundle write_durably(candidate, stream())",
}
SIGNER = generate_signer()


def explore_new_bundle(folder):
    """In a folder that is made for it."""
    out = folder / "work" / "dist" / "kws.edgekit"
    with Recorder(folder / "work", promised=False) as recorder:
        tiny_bundle(out, SIGNER)
        recorder.promise(True)

    def check(folder, is_written):
        path = folder / "dist" / "kws.edgekit"
        assert path.exists() or not is_written, "the bundle is gone"
        if path.exists():
            assert verify_bundle(path, [SIGNER.public_key]).manifest.version == "1.0.0"

    return Explorer("new bundle", recorder.trace, check, folder)


def explore_replaced_bundle(folder):
    tiny_bundle(folder / "work" / "kws.edgekit", SIGNER, version="1")
    with Recorder(folder / "work", promised=("1", "2")) as recorder:
        tiny_bundle(folder / "work" / "kws.edgekit", SIGNER, version="2")
        recorder.promise(("2",))

    def check(folder, versions):
        assert verify_bundle(folder / "kws.edgekit", [SIGNER.public_key]).manifest.version in versions
        tiny_bundle(folder / "kws.edgekit", SIGNER, version="3")

    return Explorer("replaced bundle", recorder.trace, check, folder)


def explore_key(folder, *, has_hard_links=True):
    """A key that is not there yet may be made again."""
    signer = generate_signer()
    with Recorder(folder / "work", promised=False, has_hard_links=has_hard_links) as recorder:
        save_signer(signer, folder / "work" / "keys" / "k.pem")
        recorder.promise(True)

    def check(folder, is_saved):
        path = folder / "keys" / "k.pem"
        assert path.exists() or not is_saved, "the key is gone"
        if not path.exists():
            save_signer(signer, path)
        assert load_signer(path).keyid == signer.keyid

    return Explorer("key" if has_hard_links else "key without links", recorder.trace, check, folder)


def explore_key_without_links(folder):
    return explore_key(folder, has_hard_links=False)


SCENARIOS = [explore_key, explore_key_without_links, explore_new_bundle, explore_replaced_bundle]


@pytest.fixture(scope="module")
def explorers():
    made, scratch = {}, scratch_folder()

    def explorer(explore):
        if explore not in made:
            (scratch / explore.__name__ / "work").mkdir(parents=True)
            made[explore] = explore(scratch / explore.__name__)
        return made[explore]

    yield explorer
    shutil.rmtree(scratch)


@pytest.mark.fault("F3")
@pytest.mark.parametrize("explore", SCENARIOS, ids=lambda explore: explore.__name__.removeprefix("explore_"))
def test_file_after_a_power_cut_at_any_moment(explorers, explore):
    found = list(explorers(explore).violations())
    assert not found, "\n".join(map(str, found[:10]))


@pytest.mark.fault("F3")
def test_fsync_of_a_file_forgotten(explorers):
    left = survivors([explorers(explore) for explore in SCENARIOS], redundant=REDUNDANT)
    assert not left, "\n".join(map(str, left.values()))


# --- the disk itself: a model that finds nothing would prove nothing


def states_of(folder, work):
    """What each crash state of some work holds."""
    (folder / "work").mkdir(parents=True)
    with Recorder(folder / "work") as recorder:
        work(folder / "work")
    found = set()

    def note(state, _promised):
        files = {str(path.relative_to(state)): path.read_bytes() for path in state.rglob("*") if path.is_file()}
        found.add(tuple(sorted(item for item in files.items() if ".new-" not in item[0])))

    assert not list(Explorer("", recorder.trace, note, folder).violations())
    return found


@pytest.mark.fault("F3")
def test_disk_with_a_file_that_nobody_fsynced(tmp_path):
    found = states_of(tmp_path, lambda work: (work / "a").write_bytes(b"content"))
    assert found == {(), (("a", b""),), (("a", b"con"),), (("a", b"con\0\0\0\0"),), (("a", b"content"),)}


@pytest.mark.fault("F3")
def test_disk_with_a_file_that_was_written_durably(tmp_path):
    assert states_of(tmp_path, lambda work: write_durably(work / "a", b"content")) == {(), (("a", b"content"),)}


@pytest.mark.fault("F3")
def test_disk_with_a_name_that_nobody_fsynced(tmp_path):
    def work(folder):
        write_durably(folder / "a", b"old")
        write_durably(folder / "b", b"new")
        (folder / "b").replace(folder / "a")

    old, new = ("a", b"old"), ("a", b"new")
    assert states_of(tmp_path, work) == {(), (old,), (old, ("b", b"new")), (new,)}


@pytest.mark.fault("F3")
def test_disk_with_bytes_added_to_durable_ones(tmp_path):
    def work(folder):
        write_durably(folder / "a", b"kept")
        with (folder / "a").open("ab") as file:
            file.write(b"+more")

    contents = {dict(state)["a"] for state in states_of(tmp_path, work) if state}
    assert contents == {b"kept", b"kept+m", b"kept+m\0\0\0", b"kept+more"}


@pytest.mark.fault("F3")
def test_disk_with_a_folder_whose_name_is_not_durable(tmp_path):
    def work(folder):
        (folder / "f").mkdir()
        write_durably(folder / "f" / "a", b"content")

    assert states_of(tmp_path, work) == {(), (("f/a", b"content"),)}


@pytest.mark.fault("F3")
def test_fsync_that_is_forgotten_is_found(tmp_path):
    """The promise that a written key is there is kept by both fsyncs, and by no other."""
    (tmp_path / "work").mkdir()
    explorer = explore_key(tmp_path)
    assert not list(explorer.violations())
    assert len(explorer.trace.sites) == 3
    assert survivors([explorer]) == {}
    for site in explorer.trace.sites:
        assert any(explorer.violations(without=site)), site
