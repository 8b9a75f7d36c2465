"""A bundle as an OCI image layout: what other tools read in it, and that the same bundle comes back."""

from __future__ import annotations

import json
import shutil
import subprocess
import tracemalloc

import pytest
from releases import candidate_folder, tiny_bundle, tree_digests

from edgekit.bundle.oci import export_oci, import_oci
from edgekit.bundle.reader import read_bundle, verify_bundle
from edgekit.bundle.sealing import make_identity, seal_models
from edgekit.bundle.writer import Draft, write_bundle
from edgekit.cli.main import main
from edgekit.errors import EdgekitError
from edgekit.schema.digest import digest_bytes, digest_file
from edgekit.trust.signer import generate_signer

FILEPATH = "org.cncf.model.filepath"
needs_skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed (scripts/system-parts)")


@pytest.fixture(scope="module")
def signer():
    return generate_signer()


@pytest.fixture
def bundle(tmp_path, signer):
    return tiny_bundle(tmp_path / "kws.edgekit", [signer, generate_signer()], version="1.0.0+line.3")


@pytest.fixture
def layout(tmp_path, bundle):
    export_oci(bundle, tmp_path / "oci")
    return tmp_path / "oci"


def blob_of(layout, digest):
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


def image_of(layout):
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    return json.loads(blob_of(layout, entry["digest"]).read_text())


def change_image(layout, change):
    """Write another artifact manifest, with an index that names it."""
    image = image_of(layout)
    change(image)
    data = json.dumps(image).encode()
    blob_of(layout, digest_bytes(data)).write_bytes(data)
    index = json.loads((layout / "index.json").read_text())
    index["manifests"][0] |= {"digest": digest_bytes(data), "size": len(data)}
    (layout / "index.json").write_text(json.dumps(index))


def refusal(call, *arguments) -> EdgekitError:
    with pytest.raises(EdgekitError) as caught:
        call(*arguments)
    return caught.value


def test_layout_is_modelpack(layout, bundle):
    image = image_of(layout)
    assert image["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert image["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    assert {layer["annotations"][FILEPATH]: layer["mediaType"] for layer in image["layers"]} == {
        "model.onnx": "application/vnd.cncf.model.weight.v1.raw",
        "golden.msgpack": "application/vnd.cncf.model.dataset.v1.raw",
        ".edgekit/manifest.json": "application/vnd.cncf.model.weight.config.v1.raw",
        ".edgekit/signature.dsse.json": "application/vnd.cncf.model.doc.v1.raw",
    }
    for descriptor in [image["config"], *image["layers"]]:
        path = blob_of(layout, descriptor["digest"])
        assert (digest_file(path), path.stat().st_size) == (descriptor["digest"], descriptor["size"])
    model = next(layer for layer in image["layers"] if layer["annotations"][FILEPATH] == "model.onnx")
    assert blob_of(layout, model["digest"]).read_bytes() == b"weights" * 50
    config = json.loads(blob_of(layout, image["config"]["digest"]).read_text())
    assert config["descriptor"] == {"createdAt": "2026-11-01T12:00:00Z", "name": "kws", "version": "1.0.0+line.3"}
    assert config["config"] == {"format": "onnx", "precision": "float32"}
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in image["layers"]]}
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "1.0.0_line.3"}
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}


def test_export_and_import_give_the_identical_bytes(tmp_path, layout, bundle, signer):
    back = import_oci(layout, tmp_path / "back.edgekit")
    assert back.path.read_bytes() == bundle.read_bytes()
    assert not back.is_verified
    assert verify_bundle(back.path, [signer.public_key]).is_verified


def test_same_bundle_same_layout(tmp_path, layout, bundle):
    export_oci(bundle, tmp_path / "again")
    assert tree_digests(tmp_path / "again") == tree_digests(layout)


def test_sealed_bundle_travels_sealed(tmp_path, bundle, signer):
    recipient = make_identity(tmp_path / "d.age", tmp_path / "d.age.pub")
    plain = read_bundle(bundle)
    draft = Draft(plain.manifest, {ref.digest: plain.blob(ref.digest) for ref in plain.manifest.blobs})
    sealed = seal_models(draft, [recipient])
    path = write_bundle(sealed.manifest, sealed.blobs, signer=signer, out=tmp_path / "s.edgekit")
    export_oci(path, tmp_path / "sealed")
    paths = [layer["annotations"][FILEPATH] for layer in image_of(tmp_path / "sealed")["layers"]]
    assert "model.onnx.age" in paths
    assert import_oci(tmp_path / "sealed", tmp_path / "b.edgekit").path.read_bytes() == path.read_bytes()


def test_folder_in_use_is_not_touched(tmp_path, bundle):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "note").write_text("keep")
    assert refusal(export_oci, bundle, folder).code == "oci.exists"
    assert [path.name for path in folder.iterdir()] == ["note"]
    (tmp_path / "empty").mkdir()
    export_oci(bundle, tmp_path / "empty")
    assert (tmp_path / "empty" / "index.json").is_file()


def test_export_of_a_damaged_bundle_leaves_nothing(tmp_path, bundle):
    data = bytearray(bundle.read_bytes())
    data[100] ^= 1
    bundle.write_bytes(data)
    refusal(export_oci, bundle, tmp_path / "oci")
    assert [path.name for path in tmp_path.iterdir()] == [bundle.name]


def test_every_changed_layer_refused(tmp_path, layout):
    for layer in image_of(layout)["layers"]:
        path = blob_of(layout, layer["digest"])
        good = path.read_bytes()
        for place in (0, len(good) // 2, -1):
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bad)
            refusal(import_oci, layout, tmp_path / "back.edgekit")
        path.write_bytes(good)
    assert not (tmp_path / "back.edgekit").exists()
    assert not list(tmp_path.glob(".back*"))
    assert import_oci(layout, tmp_path / "back.edgekit")


def test_layouts_that_are_none_of_ours_refused(tmp_path, layout):
    out = tmp_path / "back.edgekit"
    assert refusal(import_oci, tmp_path / "gone", out).code == "oci.not_found"

    def refused(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(layout, copy)
        change(copy)
        error = refusal(import_oci, copy, out)
        assert not out.exists()
        return error

    def without(name):
        def change(image):
            image["layers"] = [layer for layer in image["layers"] if layer["annotations"][FILEPATH] != name]

        return lambda copy: change_image(copy, change)

    def image_type(image):
        image["artifactType"] = "application/vnd.other"
        image["config"]["mediaType"] = "application/vnd.oci.image.config.v1+json"

    def as_image(copy):
        change_image(copy, image_type)
        index = json.loads((copy / "index.json").read_text())
        del index["manifests"][0]["artifactType"]
        (copy / "index.json").write_text(json.dumps(index))

    def escape(image):
        image["layers"][0]["digest"] = "sha256:../../../../etc/passwd"

    def lose(copy):
        blob_of(copy, image_of(copy)["layers"][0]["digest"]).unlink()

    def two(copy):
        index = json.loads((copy / "index.json").read_text())
        (copy / "index.json").write_text(json.dumps(index | {"manifests": index["manifests"] * 2}))

    def other_bytes(copy):
        (entry,) = json.loads((copy / "index.json").read_text())["manifests"]
        path = blob_of(copy, entry["digest"])
        path.write_bytes(path.read_bytes() + b" ")

    assert ".edgekit/manifest.json" in refused(without(".edgekit/manifest.json")).message
    assert refused(without(".edgekit/signature.dsse.json")).code == "oci.malformed"
    assert refused(without("model.onnx")).code == "bundle.malformed"
    assert "no model" in refused(as_image).message
    assert refused(lambda copy: change_image(copy, escape)).code == "oci.malformed"
    assert refused(lose).code == "oci.malformed"
    assert "2 artifacts" in refused(two).message
    assert "the index names" in refused(other_bytes).message
    assert refused(lambda copy: (copy / "index.json").write_text("{")).code == "oci.malformed"


def test_memory_stays_bounded(tmp_path, signer):
    path = tiny_bundle(tmp_path / "big.edgekit", signer, model=bytes(48 << 20))
    tracemalloc.start()
    try:
        export_oci(path, tmp_path / "oci")
        import_oci(tmp_path / "oci", tmp_path / "back.edgekit")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert digest_file(tmp_path / "back.edgekit") == digest_file(path)
    assert peak < 8 << 20


@needs_skopeo
def test_skopeo_reads_and_copies_it(tmp_path, layout, bundle):
    def skopeo(*arguments):
        done = subprocess.run(["skopeo", *arguments], capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    raw = skopeo("inspect", "--raw", f"oci:{layout}:1.0.0_line.3")
    assert digest_bytes(raw) == entry["digest"]
    assert digest_bytes(skopeo("inspect", "--config", "--raw", f"oci:{layout}")) == image_of(layout)["config"]["digest"]
    skopeo("copy", f"oci:{layout}", f"oci:{tmp_path / 'other'}:any")
    assert tree_digests(tmp_path / "other" / "blobs") == tree_digests(layout / "blobs")
    back = import_oci(tmp_path / "other", tmp_path / "back.edgekit")
    assert back.path.read_bytes() == bundle.read_bytes()


def test_export_and_import_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    candidate_folder(tmp_path / "out")
    assert main(["bundle", "keygen", "--out", "p"]) == 0
    assert main(["bundle", "pack", "out", "--name", "kws", "--version", "1.0", "--key", "p.pem"]) == 0
    capsys.readouterr()
    assert main(["bundle", "export", "kws-1.0.edgekit", "--oci", "layout"]) == 0
    (entry,) = json.loads((tmp_path / "layout" / "index.json").read_text())["manifests"]
    assert capsys.readouterr().out.split() == ["layout", entry["digest"]]
    assert main(["bundle", "import", "--oci", "layout", "--out", "again.edgekit"]) == 0
    assert (tmp_path / "again.edgekit").read_bytes() == (tmp_path / "kws-1.0.edgekit").read_bytes()
    assert main(["bundle", "verify", "again.edgekit", "--key", "p.pub"]) == 0
    assert main(["bundle", "export", "kws-1.0.edgekit", "--oci", "layout"]) == 2
