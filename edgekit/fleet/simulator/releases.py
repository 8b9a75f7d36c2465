"""The releases that simulated devices can run: invented by name, or those that an update repository lists.

A desired state names a manifest by its digest and brings no release, so a device must know what there is.

>>> book = ReleaseBook([invent_release("kws@2.0.0", counter=1)])
>>> book.first.label, book.find("kws", 1, book.first.manifest) is book.first
('kws@2.0.0', True)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.bundle.reader import read_bundle
from edgekit.errors import UsageError
from edgekit.fleet.simulator.population import Population
from edgekit.schema.base import Record, decode_json
from edgekit.schema.baseline import ReferenceProfile
from edgekit.schema.digest import digest_bytes

if TYPE_CHECKING:
    from edgekit.fleet.catalog import Catalog

DIGEST_DIGITS = 12
SIZE_BYTES = 4_000_000
_NAME = re.compile(r"([a-z0-9][a-z0-9._-]*)@([0-9A-Za-z][0-9A-Za-z.+_-]*)(?:#([0-9]+))?\Z")


class SimulatedRelease(Record, frozen=True, kw_only=True):
    """A release as a device knows it once it is installed."""

    model: str
    version: str
    counter: int
    manifest: str
    model_digest: str
    size_bytes: int = SIZE_BYTES

    @property
    def label(self) -> str:
        """Name and version, for people."""
        return f"{self.model}@{self.version}"

    @property
    def short(self) -> str:
        """The model's digest as windows carry it."""
        return self.model_digest.removeprefix("sha256:")[:DIGEST_DIGITS]


def invent_release(text: str, *, counter: int) -> SimulatedRelease:
    """A release that exists by its name only; its digests follow from it, so that every run names the same.

    Args:
        text: ``NAME@VERSION`` or ``NAME@VERSION#COUNTER``.
        counter: where the text has none.

    Raises:
        UsageError: ``release.name``.
    """
    found = _NAME.match(text)
    if found is None:
        raise UsageError("release.name", f"release {text!r}: not NAME@VERSION.", hint="For example kws@2.0.0.")
    name, version, number = found.groups()
    return SimulatedRelease(
        model=name,
        version=version,
        counter=int(number or counter),
        manifest=digest_bytes(f"edgekit simulated manifest {name}@{version}".encode()),
        model_digest=digest_bytes(f"edgekit simulated model {name}@{version}".encode()),
    )


class ReleaseBook:
    """What there is; the first is what devices run when the simulation begins."""

    def __init__(
        self,
        releases: Sequence[SimulatedRelease],
        *,
        population: Population | None = None,
        populations: Mapping[str, Population] | None = None,
    ) -> None:
        """Keep them.

        Args:
            releases: at least one; the first is the one in service.
            population: what devices see with a release that has no profile of its own; None is the built-in one.
            populations: by manifest.
        """
        if not releases:
            raise UsageError("release.name", "no release to simulate.", hint="Give --model NAME@VERSION.")
        self.first = releases[0]
        self._known = {(each.model, each.counter, each.manifest): each for each in releases}
        self._fallback = population or Population()
        self._populations = dict(populations or {})

    @property
    def releases(self) -> tuple[SimulatedRelease, ...]:
        """All of them."""
        return tuple(self._known.values())

    def find(self, model: str, counter: int, manifest: str) -> SimulatedRelease | None:
        """The release that a desired state names."""
        return self._known.get((model, counter, manifest))

    def label_of(self, manifest: str) -> str:
        """Name and version of a manifest; empty when there is none such."""
        return next((each.label for each in self._known.values() if each.manifest == manifest), "")

    def population(self, release: SimulatedRelease) -> Population:
        """What devices that run it see."""
        return self._populations.get(release.manifest, self._fallback)


def read_bundle_release(path: Path, *, counter: int) -> tuple[SimulatedRelease, Population]:
    """The release in a bundle, and what devices see by its reference profile. Its signature is not looked at.

    Raises:
        UsageError: ``bundle.no_baseline``, or the file cannot be read.
        ArtifactError: it is damaged.
    """
    bundle = read_bundle(path)
    manifest = bundle.manifest
    ref = next((ref for ref in manifest.blobs if ref.role == "baseline"), None)
    if ref is None:
        text = f"{path}: has no reference profile."
        raise UsageError("bundle.no_baseline", text, hint="Pack it with --data, or give no --bundle.")
    data = bundle.blob(ref.digest)
    release = SimulatedRelease(
        model=manifest.name,
        version=manifest.version,
        counter=counter,
        manifest=bundle.manifest_digest,
        model_digest=manifest.variants[0].model,
        size_bytes=sum(blob.size_bytes for blob in manifest.blobs),
    )
    return release, Population(decode_json(data, ReferenceProfile, name=ref.path), data=data)


def read_catalog(catalog: Catalog, label: str, *, population: Population | None = None) -> ReleaseBook:
    """The releases of a repository, with their reference profiles.

    Args:
        catalog: refreshed.
        label: the release in service, ``NAME@VERSION``.
        population: for releases without a profile.

    Raises:
        UsageError: ``release.unknown``.
        RepositoryError: it cannot be reached.
        TrustError: a digest is wrong.
    """
    releases, populations = [], {}
    for release in catalog.releases():
        info = release.info
        variants = catalog.manifest(release).variants
        found = SimulatedRelease(
            model=info.name,
            version=info.version,
            counter=info.counter,
            manifest=release.manifest_digest,
            model_digest=variants[0].model,
            size_bytes=info.installed_bytes,
        )
        releases.append(found)
        if release.manifest_digest not in populations and (profile := catalog.profile(release.manifest_digest)) is not None:
            populations[release.manifest_digest] = Population(profile[0], crc=profile[1])
    serving = next((each for each in releases if each.label == label), None)
    if serving is None:
        known = ", ".join(dict.fromkeys(each.label for each in releases)) or "none"
        raise UsageError("release.unknown", f"--model {label}: the repository lists {known}.")
    ordered = [serving, *(each for each in releases if each is not serving)]
    return ReleaseBook(ordered, population=population, populations=populations)
