"""Topics: ``ek/1/{site}/{device}/{verb}``, five levels, so that every public broker's limits hold.

>>> topic("lab", "pi-1", "w")
'ek/1/lab/pi-1/w'
>>> parse_topic("ek/1/lab/pi-1/w")
('lab', 'pi-1', 'w')
"""

from __future__ import annotations

import re
from typing import Literal, cast, get_args

from edgekit.errors import ArtifactError, UsageError

Verb = Literal["status", "hb", "w", "x", "ev", "lb", "rep", "des", "cmd", "rsp"]
ROOT = "ek/1"
VERBS: tuple[Verb, ...] = get_args(Verb)
UPLINK: tuple[Verb, ...] = ("status", "hb", "w", "ev", "rep", "lb", "x")
"""What a device publishes and the fleet server stores."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")


def check_name(name: str, what: str) -> str:
    """A site's or device's name, if it may stand in a topic.

    Raises:
        UsageError: ``telemetry.name`` when it may not.
    """
    if not _NAME.match(name):
        raise UsageError(
            "telemetry.name",
            f"{what} {name!r}: not a valid name.",
            hint="Use 1 to 63 of a-z, 0-9, - and _, beginning with a letter or a digit.",
        )
    return name


def topic(site: str, device: str, verb: Verb) -> str:
    """The topic of a device's verb.

    Raises:
        UsageError: ``telemetry.name``.
    """
    return f"{ROOT}/{check_name(site, 'site')}/{check_name(device, 'device')}/{verb}"


def parse_topic(text: str) -> tuple[str, str, Verb]:
    """Site, device and verb of a topic.

    Raises:
        ArtifactError: ``telemetry.topic`` when it is not one of ours.
    """
    parts = text.split("/")
    is_ours = len(parts) == 5 and f"{parts[0]}/{parts[1]}" == ROOT and parts[4] in VERBS
    if not is_ours or not _NAME.match(parts[2]) or not _NAME.match(parts[3]):
        raise ArtifactError("telemetry.topic", f"topic {text[:200]!r}: not {ROOT}/<site>/<device>/<verb>.")
    return parts[2], parts[3], cast("Verb", parts[4])


def subscription(verb: Verb, *, site: str = "+", device: str = "+", group: str = "") -> str:
    """The filter for a verb of all devices; shared by the consumers of ``group`` when one is given."""
    pattern = f"{ROOT}/{site}/{device}/{verb}"
    return f"$share/{group}/{pattern}" if group else pattern
