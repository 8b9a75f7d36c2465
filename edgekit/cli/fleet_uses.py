"""Which releases the fleet's devices run, hold in their other slot, or installed once: asked of the fleet server.

Nothing is left out silently: where the server has more than is read here, or does not answer, that is an error.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator

from edgekit.cli.fleet import all_devices
from edgekit.cli.fleet_http import get_json
from edgekit.errors import EnvironmentFault
from edgekit.repository.lineage import DeviceUse

_PAGE = 500
_MOST_PAGES = 200
INSTALLED = "install_finished"


def slots_in_use(url: str) -> list[DeviceUse]:
    """Every device's slots: what it serves, and what it could go back to.

    Raises:
        EnvironmentFault: ``fleet.unreachable`` or ``fleet.refused``.
    """
    found: list[DeviceUse] = []
    for item in all_devices(url, ""):
        place = "/".join(urllib.parse.quote(item[part], safe="") for part in ("site", "device"))
        detail = get_json(url, f"/api/v1/devices/{place}")
        for slot in detail["slots"]:
            if not slot["model"]:
                continue
            found.append(
                DeviceUse(
                    site=item["site"],
                    device=item["device"],
                    use="runs" if slot["name"] == detail["active"] else "holds",
                    model=slot["model"],
                    version=slot["version"],
                    counter=slot["counter"],
                    at_ms=item["last_seen_ms"],
                )
            )
    return found


def installed_once(url: str) -> Iterator[DeviceUse]:
    """What devices reported to have installed, the newest first.

    Raises:
        EnvironmentFault: ``fleet.unreachable``, ``fleet.refused``, or ``fleet.too_many`` events to read.
    """
    before: int | None = None
    for _ in range(_MOST_PAGES):
        query = {"kind": INSTALLED, "limit": str(_PAGE)} | ({"before": str(before)} if before is not None else {})
        page = get_json(url, f"/api/v1/events?{urllib.parse.urlencode(query)}")
        for item in page["events"]:
            yield DeviceUse(
                site=item["site"],
                device=item["device"],
                use="ran",
                model=item["model"],
                version=item["version"],
                counter=item["counter"],
                at_ms=item["time_ms"],
            )
        before = page["next"]
        if before is None:
            return
    raise EnvironmentFault(
        "fleet.too_many", f"{url}: more than {_MOST_PAGES * _PAGE} installations.", hint="Ask without --fleet."
    )


def uses_of(url: str, model: str, version: str) -> list[DeviceUse]:
    """The devices that run, hold or ran one release, each once a use; who runs it is not listed among who ran it."""
    now = [use for use in slots_in_use(url) if (use.model, use.version) == (model, version)]
    known = {(use.site, use.device) for use in now}
    for use in installed_once(url):
        if (use.model, use.version) == (model, version) and (use.site, use.device) not in known:
            known.add((use.site, use.device))
            now.append(use)
    return now
