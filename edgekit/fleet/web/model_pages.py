"""The pages about models: versions beside each other, quality, drift, and the releases with where they come from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import HTMLResponse

from edgekit.errors import EdgekitError
from edgekit.fleet.api import now_ms
from edgekit.fleet.catalog import Catalog
from edgekit.fleet.services import Services
from edgekit.fleet.views import ReleaseView
from edgekit.fleet.watch.views import StreamDrift, VersionView
from edgekit.fleet.web.frame import Site
from edgekit.schema.base import Record
from edgekit.schema.manifest import Manifest
from edgekit.schema.release import Release

DAY_MS = 86_400_000
DAYS = (1, 7, 30)
_Days = Annotated[int, Query(ge=1, le=366)]


class ModelSummary(Record, frozen=True, kw_only=True):
    """One model: what runs, and what was found."""

    name: str
    releases: tuple[ReleaseView, ...]
    serving: int
    findings: int = 0
    channels: tuple[str, ...] = ()


class ReleaseEntry(Record, frozen=True, kw_only=True):
    """A release with its manifest, where that can be read, and who serves it."""

    release: Release
    manifest: Manifest | None
    problem: str
    serving: int
    refusing: int
    recalled: str = ""
    """Why, when it is recalled."""
    is_newest: bool = False
    """Of its channel."""


def summarize(services: Services) -> tuple[ModelSummary, ...]:
    """Every model that somebody serves, watches or publishes."""
    running: dict[str, list[ReleaseView]] = defaultdict(list)
    for view in services.store.releases():
        if view.model:
            running[view.model].append(view)
    channels: dict[str, set[str]] = defaultdict(set)
    for release in services.catalog.releases() if services.catalog else ():
        channels[release.info.name].add(release.info.channel)
    found: dict[str, int] = defaultdict(int)
    for finding in services.watch.findings() if services.watch else ():
        found[finding.model] += 1
    watched = services.watch.models() if services.watch else ()
    return tuple(
        ModelSummary(
            name=name,
            releases=tuple(running[name]),
            serving=sum(view.serving for view in running[name]),
            findings=found[name],
            channels=tuple(sorted(channels[name])),
        )
        for name in sorted({*running, *channels, *watched})
    )


def list_releases(catalog: Catalog, name: str, running: Iterable[ReleaseView]) -> tuple[ReleaseEntry, ...]:
    """A model's releases, newest first."""
    releases = sorted(catalog.releases(model=name), key=lambda item: item.info.published_at, reverse=True)
    counts = {(view.version, view.counter): view for view in running if view.model == name}
    recalled = {recall.digest: recall.reason for recall in catalog.recalls()}
    newest: dict[str, Release] = {}
    for release in releases:
        best = newest.setdefault(release.info.channel, release)
        newest[release.info.channel] = max(best, release, key=lambda item: item.info.counter)
    entries = []
    for release in releases:
        manifest, problem = _read_manifest(catalog, release)
        view = counts.get((release.info.version, release.info.counter))
        digests = [release.manifest_digest, *(variant.model for variant in (manifest.variants if manifest else ()))]
        entries.append(
            ReleaseEntry(
                release=release,
                manifest=manifest,
                problem=problem,
                serving=view.serving if view else 0,
                refusing=view.refusing if view else 0,
                recalled=next((recalled[digest] for digest in digests if digest in recalled), ""),
                is_newest=newest[release.info.channel] is release,
            )
        )
    return tuple(entries)


def _read_manifest(catalog: Catalog, release: Release) -> tuple[Manifest | None, str]:
    try:
        return catalog.manifest(release), ""
    except EdgekitError as error:
        return None, error.message


def _choose_stream(streams: Sequence[StreamDrift], stream: str, slice_name: str) -> StreamDrift | None:
    """The one that was asked for, else the one to look at first."""
    asked = [item for item in streams if item.stream == stream and (not slice_name or item.slice == slice_name)]
    return next(iter(asked or ([] if stream else streams)), None)


def make_router(site: Site) -> APIRouter:
    """The routes."""
    router = APIRouter(include_in_schema=False)
    _add_models(router, site)
    _add_drift(router, site)
    _add_registry(router, site)
    return router


def _add_models(router: APIRouter, site: Site) -> None:
    services = site.services

    @router.get("/models", response_class=HTMLResponse)
    def models(request: Request) -> HTMLResponse:
        return site.page(
            request,
            "models.html",
            models=summarize(services),
            is_watched=services.watch is not None,
            orders=services.work.list(limit=20) if services.work else (),
        )

    @router.get("/models/{name}", response_class=HTMLResponse)
    def model(request: Request, name: str, days: _Days = 1) -> HTMLResponse:
        summary = next((item for item in summarize(services) if item.name == name), None)
        if summary is None:
            raise HTTPException(404, f"{name[:64]}: no device serves a model of this name, and no release has it")
        now, watch = now_ms(), services.watch
        since = now - days * DAY_MS
        versions: tuple[VersionView, ...] = watch.versions(name, now_ms=now, since_ms=since) if watch else ()
        return site.page(
            request,
            "model.html",
            summary=summary,
            days=days,
            choices=DAYS,
            overall=[item for item in versions if not item.device_class],
            by_class=[item for item in versions if item.device_class],
            quality=watch.quality(name, now_ms=now, since_ms=since) if watch else None,
            findings=watch.findings(name) if watch else (),
            rollouts=services.rollouts.views(now, model=name)[:5] if services.rollouts else (),
        )


def _add_drift(router: APIRouter, site: Site) -> None:
    services = site.services

    @router.get("/drift/{name}", response_class=HTMLResponse)
    def drift(
        request: Request,
        name: str,
        days: _Days = 7,
        stream: Annotated[str, Query(max_length=200)] = "",
        slice: Annotated[str, Query(max_length=200)] = "",  # noqa: A002 - the query's own word
    ) -> HTMLResponse:
        if services.watch is None:
            raise HTTPException(404, "this server watches no drift")
        now = now_ms()
        page = services.watch.drift(name, now - days * DAY_MS, now_ms=now, slice_name=slice)
        chosen = _choose_stream(page.streams, stream, slice)
        values = {"view": page, "chosen": chosen, "days": days, "choices": DAYS, "slice_name": slice, "stream": stream}
        return site.page(request, "drift.html", name=name, findings=services.watch.findings(name), **values)


def _add_registry(router: APIRouter, site: Site) -> None:
    services = site.services

    @router.get("/registry", response_class=HTMLResponse)
    def registry(request: Request) -> HTMLResponse:
        catalog = services.catalog
        newest: dict[tuple[str, str], Release] = {}
        for release in catalog.releases() if catalog else ():
            newest[release.info.name, release.info.channel] = release
        names = sorted({name for name, _channel in newest})
        channels = sorted({channel for _name, channel in newest})
        running = services.store.releases()
        serving = {name: sum(view.serving for view in running if view.model == name) for name in names}
        return site.page(
            request,
            "registry.html",
            status_view=catalog.status() if catalog else None,
            newest=newest,
            names=names,
            channels=channels,
            serving=serving,
        )

    @router.get("/registry/{name}", response_class=HTMLResponse)
    def release_list(request: Request, name: str, channel: Annotated[str, Query(max_length=64)] = "") -> HTMLResponse:
        if services.catalog is None:
            raise HTTPException(404, "this server does not know the repository: start it with --repository URL")
        entries = list_releases(services.catalog, name, services.store.releases())
        if not entries:
            raise HTTPException(404, f"{name[:64]}: signed metadata lists no release of this name")
        channels = sorted({entry.release.info.channel for entry in entries})
        shown = tuple(entry for entry in entries if not channel or entry.release.info.channel == channel)
        return site.page(request, "release.html", name=name, entries=shown, channels=channels, channel=channel)
