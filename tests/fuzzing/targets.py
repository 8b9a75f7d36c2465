"""What is fuzzed: how an input is made, what is done with it, and what must hold when it is accepted.

Each target reads bytes that an attacker may choose. Only errors of the project's own tree may come out; an input that is
accepted must satisfy the target's claims, which are assertions here: no forgery verifies, and what a device then does with the
record does not fail either. Keys are fixed, so that an input that was kept means the same for ever.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical
from tuf.api.exceptions import RepositoryError as TufRepositoryError
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, TargetFile, Targets
from tuf.api.serialization.json import JSONSerializer

from edgekit.agent.plan import DeviceFacts, check_manifest, choose_release, choose_variant, needed_blobs
from edgekit.agent.validity import find_ban
from edgekit.bundle.delta.apply import apply_delta
from edgekit.bundle.delta.layout import MAGIC, PREFIX, parse_header, unpack
from edgekit.bundle.delta.make import _hdiff as make_delta_by_hdiff
from edgekit.bundle.delta.make import subtract
from edgekit.bundle.layout import MANIFEST_NAME, SIGNATURE_NAME, Entry, arrange
from edgekit.bundle.reader import parse_manifest, read_bundle, verify_bundle
from edgekit.errors import EdgekitError, TrustError
from edgekit.schema.base import encode_json, encode_msgpack
from edgekit.schema.desired import DESIRED_MEDIA_TYPE, DesiredModel, DesiredState, UpdatePolicy
from edgekit.schema.digest import digest_bytes
from edgekit.schema.manifest import MANIFEST_MEDIA_TYPE, Manifest, Requires, Sealed
from edgekit.schema.message import SlotReport
from edgekit.schema.release import DeltaCodec, DeltaRef, Recall, RecallList, Release, ReleaseInfo
from edgekit.schema.state import AgentState, Floors, Slot
from edgekit.trust.desired import parse_desired, select_release, verify_desired
from edgekit.trust.dsse import decode_envelope, encode_envelope, verify_envelope
from edgekit.trust.floors import check_release, raise_release
from edgekit.trust.metadata import fingerprint, list_releases, recalls_of, refuse_duplicate_keys
from edgekit.trust.offline import read_stick
from edgekit.trust.signer import Signer, sign_envelope
from tests.fuzzing.mutation import Dice, Sample, mutate_bytes, mutate_json, mutate_numbers, mutate_tree, zip_numbers
from tests.releases import tiny_bundle

logging.getLogger("edgekit").addHandler(logging.NullHandler())  # what is passed over is logged; nobody reads it here

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
DEVICE = "cam-7"
RAW, PLANNED = b"\x00", b"\x01"
"""First byte of an input of a coverage-guided engine: what follows is the input itself, or a program."""
MEMORY = Path("/dev/shm")


def fixed_signer(number: int) -> Signer:
    """A key that is the same in every run."""
    return Signer(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


TRUSTED, SECOND, STRANGER = fixed_signer(1), fixed_signer(2), fixed_signer(3)
KEYS = (TRUSTED.public_key, SECOND.public_key)


class Target(ABC):
    """One thing that reads bytes it cannot trust."""

    name: str
    refusals: tuple[type[Exception], ...] = (EdgekitError,)

    @property
    @abstractmethod
    def seeds(self) -> tuple[bytes, ...]:
        """Valid inputs."""

    @abstractmethod
    def make(self, program: bytes) -> bytes:
        """An input that is nearly valid."""

    @abstractmethod
    def accept(self, data: bytes) -> None:
        """Do what a device does with the input; assertions say what must hold once it is accepted."""

    def run(self, data: bytes) -> bool:
        """Whether the input was accepted; anything but a refusal comes out."""
        try:
            self.accept(data)
        except self.refusals as error:
            if isinstance(error, EdgekitError):
                f"{error.message}{error.hint}".encode()  # it is logged, and reported as MessagePack
            return False
        return True

    def decode(self, data: bytes) -> bytes:
        """The input that an engine's bytes mean: see ``RAW`` and ``PLANNED``."""
        return self.make(data[1:]) if data[:1] == PLANNED else data[1:]


# --- records


_FOLDERS: list[Path] = []


def _scratch() -> Path:
    """A folder in memory, gone when the process ends."""
    _FOLDERS.append(Path(tempfile.mkdtemp(prefix="edgekit-fuzz-", dir=MEMORY if MEMORY.is_dir() else None)))
    return _FOLDERS[-1]


@atexit.register
def clean_up() -> None:
    """Remove the folders; whoever ends the process past Python's own end calls it."""
    while _FOLDERS:
        shutil.rmtree(_FOLDERS.pop(), ignore_errors=True)


def _bundle() -> bytes:
    path = _scratch() / "x.edgekit"
    return tiny_bundle(path, [TRUSTED, SECOND]).read_bytes()


def _parts(bundle: bytes) -> dict[str, bytes]:
    """Contents by name."""
    path = _scratch() / "x.edgekit"
    path.write_bytes(bundle)
    read = read_bundle(path)
    blobs = {f"blobs/sha256/{ref.digest[7:]}": read.blob(ref.digest) for ref in read.manifest.blobs}
    return {MANIFEST_NAME: read.manifest_bytes, SIGNATURE_NAME: encode_envelope(read.envelope), **blobs}


BUNDLE = _bundle()
PARTS = _parts(BUNDLE)
MANIFEST = parse_manifest(PARTS[MANIFEST_NAME])


def rich_manifest() -> Manifest:
    """With everything that a manifest may have: several variants, requirements, a sealed blob."""
    variant = msgspec.structs.replace(
        MANIFEST.variants[0],
        name="int8",
        requires=Requires(runtime="onnxruntime", runtime_version="1.32", arch=("x86_64",), isa=("avx2",), ram_mb=64.0),
    )
    sealed = Sealed(digest=digest_bytes(b"open"), size_bytes=4, recipients=("age1xyz",))
    blobs = (msgspec.structs.replace(MANIFEST.blobs[0], sealed=sealed), *MANIFEST.blobs[1:])
    return msgspec.structs.replace(MANIFEST, variants=(*MANIFEST.variants, variant), blobs=blobs)


def _release(counter: int) -> Release:
    manifest = PARTS[MANIFEST_NAME]
    info = ReleaseInfo(
        name="kws",
        version="1.0.0",
        channel="production",
        counter=counter,
        published_at=NOW,
        installed_bytes=1000,
        runtimes=("onnxruntime",),
        notes="first",
        deltas=(
            DeltaRef(
                base=digest_bytes(b"a"), target=digest_bytes(b"b"), digest=digest_bytes(b"c"), size_bytes=9, codec="tsub1"
            ),
        ),
        valid_until=NOW + timedelta(days=90),
        fallback="previous",
    )
    return Release(
        info=info,
        manifest_path="models/kws/1.0.0/production/manifest.json",
        manifest_digest=digest_bytes(manifest),
        manifest_size_bytes=len(manifest),
    )


FACTS = DeviceFacts(
    runtimes={"onnxruntime": "1.32.0"}, arch="x86_64", cpu="x", isa=("avx2",), cores=4, ram_mb=512.0, os="Linux"
)


class ManifestTarget(Target):
    """A manifest that a device fetched."""

    name = "manifest"

    @cached_property
    def _samples(self) -> tuple[Sample, ...]:
        return tuple(Sample.of_json(data) for data in self.seeds)

    @cached_property
    def seeds(self) -> tuple[bytes, ...]:  # type: ignore[override]
        return PARTS[MANIFEST_NAME], encode_json(rich_manifest())

    def make(self, program: bytes) -> bytes:
        dice = Dice(program)
        return mutate_json(dice.one(self._samples), dice)

    def accept(self, data: bytes) -> None:
        manifest = parse_manifest(data)
        encode_json(manifest)
        encode_msgpack([ref.size_bytes for ref in manifest.blobs])
        format(manifest.created_at, "%Y-%m-%d %H:%M")
        check_manifest(manifest, _RELEASE)
        variant = choose_variant(manifest, FACTS)
        assert needed_blobs(manifest, variant)


_RELEASE = _release(7)
STATE = DesiredState(
    device=DEVICE,
    seq=42,
    issued_at=NOW - timedelta(minutes=1),
    expires_at=NOW + timedelta(days=1),
    models={"kws": DesiredModel(counter=7, manifest=_RELEASE.manifest_digest)},
    policy=UpdatePolicy(not_before=NOW, jitter_s=600.0),
)


class DesiredTarget(Target):
    """A desired state from the broker; the payload is signed again, so that what is read after the check is reached."""

    name = "desired"
    _sample = Sample.of_json(encode_json(STATE))

    @cached_property
    def seeds(self) -> tuple[bytes, ...]:  # type: ignore[override]
        payload = encode_json(STATE)
        return tuple(
            sign_envelope(payload, signers, payload_type=DESIRED_MEDIA_TYPE) for signers in ([TRUSTED], [TRUSTED, STRANGER])
        )

    def make(self, program: bytes) -> bytes:
        dice = Dice(program)
        signer = dice.one((TRUSTED, TRUSTED, TRUSTED, STRANGER))
        kind = dice.one((DESIRED_MEDIA_TYPE,) * 7 + (MANIFEST_MEDIA_TYPE,))
        data = sign_envelope(mutate_json(self._sample, dice), [signer], payload_type=kind)
        return mutate_bytes(data, dice)

    def accept(self, data: bytes) -> None:
        state = verify_desired(data, KEYS, device=DEVICE, last_seq=41, now=NOW)
        assert state.device == DEVICE
        assert 41 < state.seq < 2**63
        assert state.issued_at < state.expires_at > NOW
        assert parse_desired(encode_json(state)) == state, "what the device keeps must be readable to it"
        encode_msgpack([state.seq, *(model.counter for model in state.models.values())])
        assert (NOW + timedelta(seconds=state.policy.jitter_s)).year < 3000
        assert state.policy.not_before is None or isinstance(state.policy.not_before > NOW, bool)
        assert select_release(state, [_RELEASE], "kws") is _RELEASE


class DsseTarget(Target):
    """An envelope whose payload nobody signed again: what verifies is what was signed."""

    name = "dsse"
    _payload, _kind = b'{"a": "\x00\xff payload"}' * 3, "application/vnd.test"

    @cached_property
    def seeds(self) -> tuple[bytes, ...]:  # type: ignore[override]
        return tuple(
            sign_envelope(self._payload, signers, payload_type=self._kind)
            for signers in ([TRUSTED], [TRUSTED, SECOND], [TRUSTED, SECOND, STRANGER])
        )

    @cached_property
    def _samples(self) -> tuple[Sample, ...]:
        return tuple(Sample.of_json(data) for data in self.seeds)

    def make(self, program: bytes) -> bytes:
        dice = Dice(program)
        return mutate_json(dice.one(self._samples), dice)

    def accept(self, data: bytes) -> None:
        envelope = decode_envelope(data)
        assert encode_envelope(envelope) == data
        threshold = 1 + (len(envelope.signatures) > 1)
        payload = verify_envelope(data, KEYS, payload_type=self._kind, threshold=threshold)
        assert payload == self._payload, "a payload that nobody signed was accepted"


class ZipTarget(Target):
    """A bundle file: its zip, and everything in it."""

    name = "zip"
    seeds = (BUNDLE,)
    _sample = Sample.of_fields(BUNDLE, zip_numbers(BUNDLE))
    _manifests = (Sample.of_json(PARTS[MANIFEST_NAME]), Sample.of_json(encode_json(rich_manifest())))
    _envelope = Sample.of_json(PARTS[SIGNATURE_NAME])

    @cached_property
    def _path(self) -> Path:
        return _scratch() / f"{os.getpid()}.edgekit"

    def make(self, program: bytes) -> bytes:
        dice = Dice(program)
        if dice.below(2):
            return self._rebuilt(dice)
        return mutate_numbers(self._sample, dice)

    def _rebuilt(self, dice: Dice) -> bytes:
        """A zip as the writer lays it out, of other contents."""
        parts = dict(PARTS)
        match dice.below(8):
            case 0 | 1 | 2 | 3:
                manifest = mutate_json(dice.one(self._manifests), dice)
                parts[MANIFEST_NAME] = manifest
                signer = dice.one((STRANGER, TRUSTED))
                parts[SIGNATURE_NAME] = sign_envelope(manifest, [signer], payload_type=MANIFEST_MEDIA_TYPE)
            case 4 | 5:
                parts[SIGNATURE_NAME] = mutate_json(self._envelope, dice)
            case 6:
                del parts[dice.one(sorted(parts))]
            case _:
                name = dice.one(sorted(parts))
                parts[name] = mutate_bytes(parts[name], Dice(b"\x07" + dice.take(6)))
        data = pack_zip(parts)
        return mutate_numbers(Sample.of_fields(data, zip_numbers(data)), dice)

    def accept(self, data: bytes) -> None:
        self._path.write_bytes(data)
        bundle = read_bundle(self._path)
        for ref in bundle.manifest.blobs:
            assert digest_bytes(bundle.blob(ref.digest)) == ref.digest
        verified = verify_bundle(self._path, KEYS)
        assert verified.envelope.payload == verified.manifest_bytes
        assert pack_zip(_contents(data, verified)) == data, "a byte of the file means nothing"


def _contents(data: bytes, bundle) -> dict[str, bytes]:
    blobs = {f"blobs/sha256/{ref.digest[7:]}": bundle.blob(ref.digest) for ref in bundle.manifest.blobs}
    return {MANIFEST_NAME: bundle.manifest_bytes, SIGNATURE_NAME: encode_envelope(bundle.envelope), **blobs}


def pack_zip(parts: dict[str, bytes]) -> bytes:
    """The bundle file of these contents, by the writer's own layout."""
    layout = arrange(Entry(name, len(content), zlib.crc32(content)) for name, content in parts.items())
    pieces = [placed.header + parts[placed.entry.name] for placed in layout.placed]
    return b"".join(pieces) + layout.directory


# --- update metadata


def _targets() -> Targets:
    """With releases, recalls and a delegated role."""
    targets = Targets(version=3, expires=NOW + timedelta(days=90))
    for version, counter in (("1.0.0", 7), ("2.0.0", 8)):
        release = msgspec.structs.replace(_release(counter).info, version=version)
        path = f"models/kws/{version}/production/manifest.json"
        custom = msgspec.to_builtins(release)
        targets.targets[path] = TargetFile(
            4000, {"sha256": _RELEASE.manifest_digest[7:]}, path, unrecognized_fields={"custom": custom}
        )
    recalls = RecallList(recalls=(Recall(digest=digest_bytes(b"bad"), deadline=NOW, reason="wrong labels"),))
    custom = msgspec.to_builtins(recalls)
    targets.targets["recalls.json"] = TargetFile(9, {"sha256": "0" * 64}, "recalls.json", {"custom": custom})
    key = TRUSTED.tuf_signer().public_key
    role = DelegatedRole("kws-team", [key.keyid], 1, terminating=True, paths=["models/kws/*/*/*"])
    targets.delegations = Delegations({key.keyid: key}, {"kws-team": role})
    return targets


def _root(version: int) -> Root:
    root = Root(version=version, expires=NOW + timedelta(days=365), consistent_snapshot=True)
    for role in ("root", "targets", "snapshot", "timestamp"):
        root.add_key(TRUSTED.tuf_signer().public_key, role)
    return root


def _signed(content: Root | Targets) -> bytes:
    metadata = Metadata(content)
    metadata.sign(TRUSTED.tuf_signer())
    return metadata.to_bytes(JSONSerializer(compact=True))


def sign_again(data: bytes) -> bytes:
    """The same content with a fresh signature of a trusted key, where it is JSON."""
    try:
        parsed = json.loads(data)
        covered = encode_canonical(parsed["signed"]).encode()
        parsed["signatures"] = [{"keyid": TRUSTED.keyid, "sig": TRUSTED.sign(covered).hex()}]
        return json.dumps(parsed).encode()
    except (ValueError, KeyError, TypeError, RecursionError, FormatError):
        return data


def use_releases(releases: tuple[Release, ...], recalls: tuple[Recall, ...]) -> None:
    """What an agent does with what signed metadata says: it must not fail, whatever that is."""
    state = AgentState(device=DEVICE, recalls=recalls)
    for release in releases:
        info, manifest = release.info, release.manifest_digest
        slot = Slot(
            name="a",
            status="active",
            model="kws",
            counter=info.counter,
            manifest=manifest,
            valid_until=info.valid_until,
            fallback=info.fallback,
        )
        state = msgspec.structs.replace(state, slots=(slot, Slot(name="b")), active="a")
        find_ban(state, slot, NOW)
        encode_msgpack(SlotReport(name="a", status="active", counter=info.counter))
        encode_msgpack([delta.size_bytes for delta in info.deltas] + [info.installed_bytes, release.manifest_size_bytes])
        floors = raise_release(state.floors, release)
        check_release(floors, release)
        format(info.published_at, "%Y-%m-%d %H:%M")
        choose_release(msgspec.structs.replace(state, floors=floors), releases, model="kws", channel="production")
    if recalls:
        slot = Slot(name="a", manifest=recalls[0].digest)
        find_ban(state, slot, NOW)
    assert msgspec.json.decode(encode_json(state), type=AgentState) == state


class MetadataTarget(Target):
    """Targets metadata past its signature: releases, recalls, delegations."""

    name = "metadata"
    refusals = (EdgekitError, TufRepositoryError)

    @cached_property
    def seeds(self) -> tuple[bytes, ...]:  # type: ignore[override]
        return (_signed(_targets()),)

    @cached_property
    def _sample(self) -> Sample:
        return Sample.of_json(self.seeds[0])

    def make(self, program: bytes) -> bytes:
        return mutate_json(self._sample, Dice(program))

    def accept(self, data: bytes) -> None:
        targets = Metadata.from_bytes(data).signed
        if not isinstance(targets, Targets):
            raise TrustError("trust.metadata", "other metadata")
        refuse_duplicate_keys(targets)
        roles = list(targets.delegations.roles or {}) if targets.delegations else []
        assert all(fingerprint(targets, role) for role in roles)
        use_releases(list_releases(targets, dict.fromkeys(roles, targets)), recalls_of(targets))


class StickTarget(Target):
    """A stick's metadata, signed again: the first byte says which file is the attacker's."""

    name = "stick"
    _files = ("3.targets.json", "2.root.json", "1.kws-team.json")

    @cached_property
    def seeds(self) -> tuple[bytes, ...]:  # type: ignore[override]
        contents = (_signed(_targets()), _signed(_root(2)), _signed(Targets(version=1, expires=NOW + timedelta(days=9))))
        return tuple(bytes([number]) + data for number, data in enumerate(contents))

    @cached_property
    def _samples(self) -> tuple[Sample, ...]:
        return tuple(Sample.of_json(seed[1:]) for seed in self.seeds)

    @cached_property
    def _folder(self) -> Path:
        folder = _scratch()
        (folder / "metadata").mkdir()
        return folder

    def make(self, program: bytes) -> bytes:
        dice = Dice(program)
        number = dice.one((0, 0, 1, 2))
        data = mutate_json(self._samples[number], dice)
        return bytes([number]) + (sign_again(data) if dice.below(8) < 7 else data)

    def accept(self, data: bytes) -> None:
        which = data[0] % len(self._files) if data else 0
        contents = {self._files[seed[0]]: seed[1:] for seed in self.seeds} | {self._files[which]: data[1:]}
        for name, content in contents.items():
            (self._folder / "metadata" / name).write_bytes(content)
        found = read_stick(self._folder, root=self.provisioned, floors=Floors(root=1, targets=2), now=NOW)
        use_releases(found.releases, found.recalls)
        assert found.floors.targets >= 2
        assert msgspec.json.decode(encode_json(found.floors), type=Floors) == found.floors

    @cached_property
    def provisioned(self) -> bytes:
        return _signed(_root(1))


# --- deltas


def _quantized(seed: int) -> bytes:
    """A model with an int8 weight and its scales, a float weight and an int32 bias: something for every kind of region."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    # the same for both seeds but for small differences, as after a training that went on
    base = np.random.default_rng(0)
    weight = (base.integers(-90, 90, (16, 24)) + random.integers(-2, 3, (16, 24))).astype(np.int8)
    scale = (base.uniform(0.01, 0.02, 16) * (1 + seed / 50)).astype(np.float32)
    dense = (base.normal(size=(24, 10)) + seed * random.normal(scale=1e-3, size=(24, 10))).astype(np.float32)
    bias = (base.integers(-999, 999, 10) + random.integers(-3, 4, 10)).astype(np.int32)
    plain = (base.integers(-9, 9, (8, 32)) + random.integers(-1, 2, (8, 32))).astype(np.int8)
    tensors = {"u": plain, "w": weight, "s": scale, "z": np.zeros(16, np.int8), "d": dense, "b": bias}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wf"], axis=0),
        helper.make_node("MatMul", ["x", "wf"], ["h"]),
        helper.make_node("MatMul", ["h", "d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "fuzz" * (1 + seed),
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        initializer=[numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def stored(data: bytes) -> bytes:
    """LZMA2 that does not compress: a thousand times faster to make, read by the same code."""
    chunks = [data[at : at + 65536] for at in range(0, len(data), 65536)]
    heads = [bytes([1 if number == 0 else 2]) + (len(chunk) - 1).to_bytes(2, "big") for number, chunk in enumerate(chunks)]
    return b"".join(head + chunk for head, chunk in zip(heads, chunks, strict=True)) + b"\x00"


class DeltaTarget(Target):
    """A delta for a blob that the device has: its header is packed again, so that what is read behind it is reached."""

    name = "delta"
    codec: DeltaCodec = "tsub1"

    @cached_property
    def old(self) -> bytes:
        return _quantized(0)

    @cached_property
    def new(self) -> bytes:
        return _quantized(1)

    @cached_property
    def base(self) -> Path:
        path = _scratch() / "base"
        path.write_bytes(self.old)
        return path

    @cached_property
    def seeds(self) -> tuple[bytes, ...]:  # type: ignore[override]
        return (subtract(self.old, self.new),)

    @cached_property
    def _taken_apart(self) -> tuple[list[object], list[bytes]]:
        """The header as nested lists, and the parts behind it, those that are packed as their contents."""
        data = self.seeds[0]
        header, end = parse_header(data)
        sizes = [header.side_size, header.tables_size, *header.blocks, header.planes_size, header.literals_size]
        parts = [data[end + sum(sizes[:number]) :][:size] for number, size in enumerate(sizes)]
        is_packed = [True, True, *[False] * len(header.blocks), True, True]
        opened = [unpack(part, 1 << 20) if packed else part for part, packed in zip(parts, is_packed, strict=True)]
        return msgspec.msgpack.decode(unpack(data[PREFIX.size : end], 1 << 20)), opened

    def make(self, program: bytes) -> bytes:
        dice = Dice(program)
        tree, parts = self._taken_apart
        header: object = list(tree)
        parts = list(parts)
        if dice.below(2):
            number = dice.below(len(parts))
            parts[number] = mutate_bytes(parts[number], Dice(b"\x07" + dice.take(8)))
        blocks = len(parts) - 4
        packed = [part if 2 <= number < 2 + blocks else stored(part) if part else b"" for number, part in enumerate(parts)]
        sizes = [len(part) for part in packed]
        header[-5:] = [sizes[0], sizes[1], sizes[2 : 2 + blocks], sizes[-2], sizes[-1]]  # type: ignore[index]
        for _ in range(dice.below(4)):
            header = mutate_tree(header, dice)
        try:
            raw = msgspec.msgpack.encode(header)
        except OverflowError:
            raw = b"\xff"
        raw = stored(mutate_bytes(raw, dice))
        return mutate_bytes(PREFIX.pack(MAGIC, len(raw)) + raw + b"".join(packed), dice)

    def accept(self, data: bytes) -> None:
        ref = DeltaRef(
            base=digest_bytes(self.old),
            target=digest_bytes(self.new),
            digest=digest_bytes(data),
            size_bytes=len(data),
            codec=self.codec,
        )
        out = io.BytesIO()
        try:
            apply_delta(io.BytesIO(data), self.base, out, ref=ref, size_bytes=len(self.new))
        finally:
            assert len(out.getvalue()) <= len(self.new), "more than the signed size was written"
        assert out.getvalue() == self.new


class HdiffTarget(DeltaTarget):
    """The same with the other codec, a library in C++."""

    name = "hdiff"
    codec = "hdiff"

    @cached_property
    def seeds(self) -> tuple[bytes, ...]:  # type: ignore[override]
        made = make_delta_by_hdiff(self.old, self.new)
        assert made is not None
        return (made,)

    def make(self, program: bytes) -> bytes:
        dice = Dice(program)
        data = self.seeds[0]
        for _ in range(1 + dice.below(4)):
            data = mutate_bytes(data, Dice(b"\x07" + dice.take(8)))
        return data if program else self.seeds[0]


KINDS: tuple[Callable[[], Target], ...] = (
    ManifestTarget, DesiredTarget, DsseTarget, ZipTarget, MetadataTarget, StickTarget, DeltaTarget, HdiffTarget,
)  # fmt: skip
NAMES = tuple(kind.name for kind in KINDS)


def target_of(name: str) -> Target:
    """The target of a name."""
    return next(kind() for kind in KINDS if kind.name == name)
