"""The bundle manifest: the small signed record that binds every blob of a release.

The manifest embeds the Candidate, so that evidence (accuracy, latency, lineage) travels with the model. ``variants`` has one
entry per form of the model, the preferred first; the device takes the first whose ``requires`` it meets. The embedded
candidate is the first variant's; each further variant names its own candidate's blob.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgekit.schema.artifact import ModelFormat
from edgekit.schema.base import SCHEMA_VERSION, Count, Moment, Record
from edgekit.schema.candidate import Candidate
from edgekit.schema.contract import Contract
from edgekit.schema.digest import Digest
from edgekit.schema.features import FeatureSet
from edgekit.schema.target import RuntimeName
from edgekit.schema.tensor import TensorData

ModelName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?\Z")]
ModelVersion = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z](?:[0-9A-Za-z.+_-]{0,62}[0-9A-Za-z])?\Z")]
BlobRole = Literal["model", "golden", "candidate", "report", "card", "bom", "provenance", "signature", "baseline"]
MANIFEST_MEDIA_TYPE = "application/vnd.edgekit.manifest.v1+json"


class Sealed(Record, frozen=True, kw_only=True):
    """How a blob is encrypted: the blob is one age file (https://age-encryption.org/v1) for these recipients.

    The blob's own digest and size are those of the encrypted bytes, which is what travels; ``digest`` and ``size_bytes`` here
    are those of the content, which is what a device must have after it opened the blob.
    """

    digest: Digest
    size_bytes: Count
    recipients: tuple[str, ...]
    """``age1...``, for people: who can open it."""
    scheme: Literal["age"] = "age"


class BlobRef(Record, frozen=True, kw_only=True):
    """One blob: ``path`` is its name for people, the digest is its address."""

    path: str
    role: BlobRole
    digest: Digest
    size_bytes: Count
    sealed: Sealed | None = None


class Requires(Record, frozen=True, kw_only=True):
    """What a device must have to run a variant. Empty fields ask for nothing."""

    runtime: RuntimeName
    runtime_version: str = ""
    """Minimum version of the runtime, for example ``1.32``."""
    arch: tuple[str, ...] = ()
    isa: tuple[str, ...] = ()
    """All of these."""
    isa_any: tuple[str, ...] = ()
    """At least one of these."""
    ram_mb: float | None = None


class Parity(Record, frozen=True, kw_only=True):
    """How far a variant answers as the release's first variant does, on the same samples.

    ``agreement`` is the share of samples with the same largest class (classification only), ``sqnr_db`` the signal to
    quantization noise ratio of the outputs against the first variant's.
    """

    reference: str
    """The first variant's name."""
    samples: int
    data: Digest | None
    sqnr_db: float
    agreement: float | None = None
    limit: str = ""
    """The limit that it had to meet, as it was written: ``agreement>=0.98``."""
    is_met: bool = True


class Variant(Record, frozen=True, kw_only=True):
    """One form of the model with its golden samples; the digests name blobs of the manifest."""

    name: str
    format: ModelFormat
    precision: str
    model: Digest
    golden: Digest
    requires: Requires
    target: str = ""
    """The target that it was optimized for; empty is the manifest's."""
    candidate: Digest | None = None
    """Its evidence, a blob with the role ``candidate``; None for the first variant, whose candidate is embedded."""
    parity: Parity | None = None
    """Against the first variant; None for the first."""


class Manifest(Record, frozen=True, kw_only=True):
    """One release of one model."""

    name: ModelName
    version: ModelVersion
    created_at: Moment
    target: str
    contract: Contract
    variants: tuple[Variant, ...]
    blobs: tuple[BlobRef, ...]
    candidate: Candidate
    edgekit_version: str
    schema_version: int = SCHEMA_VERSION
    features: FeatureSet | None = None
    """How the model's inputs are made of raw samples; None: they come as they are."""


class GoldenSample(Record, frozen=True, kw_only=True):
    """One raw input and the output expected of it, by tensor name."""

    inputs: dict[str, TensorData]
    outputs: dict[str, TensorData]


class GoldenFeatures(Record, frozen=True, kw_only=True):
    """Raw samples with the model inputs that must come of them, and the model's outputs.

    ``columns`` are pushed in ``chunks``, repeated, as a stream; without chunks they are one request, each row of which is one
    expected sample. With ``is_exact`` the inputs must be equal to the last bit, else within a few roundings.
    """

    columns: dict[str, TensorData]
    expected: tuple[GoldenSample, ...]
    text: dict[str, tuple[str, ...]] = {}
    """Columns that hold text."""
    chunks: tuple[int, ...] = ()
    is_exact: bool = True
    source: str = ""
    """Where the raw samples come from."""


class GoldenSet(Record, frozen=True, kw_only=True):
    """Golden samples with their tolerance; stored as a MessagePack blob.

    An output y matches the expected e when |y - e| <= atol + rtol * |e| everywhere; with ``is_top1_checked`` the argmax of
    the last axis must match too, wherever the expected top two differ by more than twice the tolerance.
    """

    samples: tuple[GoldenSample, ...]
    atol: float
    rtol: float
    is_top1_checked: bool = False
    tolerance_reason: str = ""
    schema_version: int = SCHEMA_VERSION
    features: GoldenFeatures | None = None
    """Of a release that has features."""
