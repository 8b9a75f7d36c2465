"""What only a thief of keys can do: metadata written past the commands, signed by whatever keys are given."""

from __future__ import annotations

from tuf.api.metadata import Metadata, MetaFile
from tuf.api.serialization.json import JSONSerializer

from edgekit.repository.store import Store
from edgekit.trust.signer import load_signer


def role_signers(repo, *roles):
    """The private keys of roles, as they lie in the keys folder."""
    keys = Store.open(repo).keys_dir
    return [load_signer(path) for role in roles for path in sorted(keys.glob(f"{role}*.pem"))]


def forge(repo, signed, name, signers):
    """Sign a role's content and put it where it is served."""
    metadata = Metadata(signed)
    for signer in signers:
        metadata.sign(signer.tuf_signer(), append=True)
    data = metadata.to_bytes(JSONSerializer(compact=True))
    (repo / "metadata" / name).write_bytes(data)
    return data


def forge_online(repo, chain, targets_data, *, signers=None):
    """Snapshot and timestamp over forged targets, versions one up."""
    snapshot, timestamp = chain.snapshot, chain.timestamp
    snapshot.meta["targets.json"] = MetaFile.from_data(chain.targets.version, targets_data, ["sha256"])
    snapshot.version += 1
    data = forge(repo, snapshot, f"{snapshot.version}.snapshot.json", signers or role_signers(repo, "snapshot"))
    timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, data, ["sha256"])
    timestamp.version += 1
    forge(repo, timestamp, "timestamp.json", signers or role_signers(repo, "timestamp"))
