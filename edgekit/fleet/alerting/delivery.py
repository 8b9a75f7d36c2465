"""How somebody is told: apprise for mail, chat and the rest, a signed webhook, and Alertmanager.

An address may hold secrets, so it is written with ``${NAME}`` for what stands in the server's environment, and nothing but its
scheme and host is ever shown. A webhook is ``webhook+https://host/path``: the body is JSON, and with a secret it carries
``X-Edgekit-Signature: t=SECONDS,v1=HEX``, HMAC-SHA256 of ``SECONDS.body``. ``alertmanager+http://host:9093`` speaks API v2.

A webhook's host must not be an address of this machine's own networks unless the server was told so: who may write rules must
not be able to reach what only this server can.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from edgekit.errors import EnvironmentFault, UsageError
from edgekit.fleet.alerting.engine import Alert
from edgekit.fleet.alerting.rules import Contact
from edgekit.schema.base import Record

TIMEOUT_S = 10.0
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
WEBHOOK = "webhook+"
ALERTMANAGER = "alertmanager+"


class Message(Record, frozen=True, kw_only=True):
    """What somebody is told."""

    id: str
    """The same for every attempt, so that the receiver knows it again."""
    kind: str
    title: str
    text: str
    alert: Alert
    url: str = ""
    """Of the alert's page."""


def make_message(alert: Alert, kind: str, *, number: int, url: str = "") -> Message:
    """A message about an alert."""
    labels = ", ".join(f"{label} {value}" for label, value in sorted(alert.labels.items()) if value)
    head = {"resolved": "over", "repeated": "still"}.get(kind, alert.level)
    what = alert.summary or alert.rule
    lines = [f"{alert.rule}: {alert.value:.4g}, {alert.threshold}; {alert.samples} samples."]
    lines += [f"- {line}" for line in alert.top]
    lines += [f"{name}: {value}" for name, value in alert.evidence.items()]
    lines += [f"What to do: {alert.runbook}"] if alert.runbook else []
    lines += [url] if url else []
    return Message(
        id=f"edgekit-{alert.id}-{number}",
        kind=kind,
        title=f"[{head}] {what}{f' ({labels})' if labels else ''}",
        text="\n".join(lines),
        alert=alert,
        url=url,
    )


def expand(text: str, environment: Mapping[str, str]) -> str:
    """An address with its secrets.

    Raises:
        EnvironmentFault: ``delivery.secret`` when the environment lacks one.
    """

    def find(match: re.Match[str]) -> str:
        if match[1] not in environment:
            raise EnvironmentFault(
                "delivery.secret", f"{match[0]}: not in this server's environment.", hint="Set it where the server is started."
            )
        return environment[match[1]]

    return _VARIABLE.sub(find, text)


def shown(url: str) -> str:
    """An address for people: its scheme and host; where the host may be a secret, the scheme.

    >>> shown("webhook+https://user:secret@hooks.example/T0/B0?key=1")
    'webhook+https://hooks.example/…'
    >>> shown("slack://tokenA/tokenB/#channel")
    'slack://…'
    """
    scheme, _, rest = url.partition("://")
    if not scheme.startswith((WEBHOOK, ALERTMANAGER)):
        return f"{scheme}://…" if rest else "…"
    try:
        parts = urlsplit(f"http://{rest}")
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return f"{scheme}://…"
    return f"{scheme}://{parts.hostname}{port}/…"


class Courier:
    """Delivers messages.

    Args:
        environment: where ``${NAME}`` is looked up.
        is_private_allowed: webhooks may go to addresses of this machine's own networks.
    """

    def __init__(self, *, environment: Mapping[str, str] | None = None, is_private_allowed: bool = False) -> None:
        self._environment = os.environ if environment is None else environment
        self._is_private_allowed = is_private_allowed

    def deliver(self, contact: Contact, channel: int, message: Message) -> None:
        """Send a message to one of a contact's addresses.

        Raises:
            EnvironmentFault: ``delivery.failed``, ``delivery.secret``; it may be tried again.
            UsageError: ``delivery.address``.
        """
        if not 0 <= channel < len(contact.urls):
            raise UsageError("delivery.address", f"contact {contact.name} has no address {channel} any more.")
        url = expand(contact.urls[channel], self._environment)
        if url.startswith(WEBHOOK):
            self._post_webhook(url.removeprefix(WEBHOOK), expand(contact.secret, self._environment), message)
        elif url.startswith(ALERTMANAGER):
            self._post_alertmanager(url.removeprefix(ALERTMANAGER), message)
        else:
            _notify(url, message)

    def _post_webhook(self, url: str, secret: str, message: Message) -> None:
        body = msgspec.json.encode(message)
        headers = {"X-Edgekit-Delivery": message.id}
        if secret:
            now = int(datetime.now(UTC).timestamp())
            headers["X-Edgekit-Signature"] = f"t={now},v1={sign(secret, now, body)}"
        self._post(url, body, headers)

    def _post_alertmanager(self, url: str, message: Message) -> None:
        self._post(f"{url.rstrip('/')}/api/v2/alerts", msgspec.json.encode([_as_prometheus(message)]), {})

    def _post(self, url: str, body: bytes, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UsageError("delivery.address", f"{shown(WEBHOOK + url)}: not an http(s) address.")
        if not self._is_private_allowed:
            _refuse_private(parts.hostname)
        request = urllib.request.Request(url, data=body, method="POST")  # noqa: S310 - checked above
        request.add_header("Content-Type", "application/json")
        for name, value in headers.items():
            request.add_header(name, value)
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=TIMEOUT_S) as response:
                response.read(64 * 1024)
        except (urllib.error.URLError, OSError, ValueError) as error:
            reason = f"answers {error.code}" if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
            raise EnvironmentFault("delivery.failed", f"{parts.hostname}: {reason}.") from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead where the address was not allowed to."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _refuse_private(host: str) -> None:
    """Only addresses that anybody can reach.

    Raises:
        UsageError: ``delivery.private``.
        EnvironmentFault: ``delivery.failed`` when the name cannot be resolved.
    """
    try:
        found = {item[4][0] for item in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise EnvironmentFault("delivery.failed", f"{host}: {error.strerror or error}.") from error
    for address in found:
        if not ipaddress.ip_address(str(address).partition("%")[0]).is_global:
            raise UsageError(
                "delivery.private",
                f"{host} is {address}, an address of this server's own networks.",
                hint="Start the server with --allow-private-webhooks if that is meant.",
            )


def sign(secret: str, seconds: int, body: bytes) -> str:
    """The signature of a webhook's body.

    >>> sign("s", 1, b"{}")[:8]
    'b253639b'
    """
    return hmac.new(secret.encode(), f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()


def _iso(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat()


def _as_prometheus(message: Message) -> dict[str, Any]:
    alert = message.alert
    record: dict[str, Any] = {
        "labels": {"alertname": alert.rule, "severity": alert.level, **alert.labels},
        "annotations": {"summary": message.title, "description": message.text, "runbook_url": alert.runbook},
        "startsAt": _iso(alert.fired_ms),
        "generatorURL": message.url,
    }
    if message.kind == "resolved":
        record["endsAt"] = _iso(alert.resolved_ms)
    return record


def _notify(url: str, message: Message) -> None:
    """By apprise.

    Raises:
        EnvironmentFault: ``delivery.failed``, ``delivery.no_apprise``.
        UsageError: ``delivery.address``.
    """
    try:
        import apprise  # noqa: PLC0415 - it takes a second, and not every server tells people by it
    except ImportError as error:
        raise EnvironmentFault(
            "delivery.no_apprise", "apprise is not installed.", hint="pip install 'edgekit[fleet]'"
        ) from error
    teller: Any = cast("Any", apprise).Apprise()
    if not teller.add(url):
        raise UsageError("delivery.address", f"{shown(url)}: apprise does not know such an address.")
    kinds = {"critical": apprise.NotifyType.FAILURE, "warning": apprise.NotifyType.WARNING}
    kind = apprise.NotifyType.SUCCESS if message.kind == "resolved" else kinds.get(message.alert.level, apprise.NotifyType.INFO)
    if not teller.notify(title=message.title, body=message.text, notify_type=kind):
        raise EnvironmentFault("delivery.failed", f"{shown(url)}: it was not taken.")


def addresses(contact: Contact) -> Sequence[str]:
    """A contact's addresses, for people."""
    return [shown(url) for url in contact.urls]
