"""Hand a signed command to a device and wait for its answer. It comes signed: this knows no key.

The command is published again until the device says that it begins, since a broker keeps nothing for a device that was away for
long; a device carries a command out once, however often it comes.

    >>> send_command(broker, command, envelope, site="lab", timeout_s=60)  # doctest: +SKIP
    CommandResult(media_type='application/json', data=b'...', text='probe: 612 bytes')
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edgekit.errors import ArtifactError, DeviceError, EnvironmentFault
from edgekit.fleet.config import BrokerAddress
from edgekit.schema.base import decode_msgpack
from edgekit.schema.command import Command, CommandPart
from edgekit.telemetry.topics import topic

AGAIN_SECONDS = 5.0
CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 30
MAX_PART_BYTES = 256 * 1024
MAX_PARTS = 128
_STEP_S = 0.2


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """What a device answered to a command that it carried out."""

    text: str
    media_type: str
    data: bytes


@dataclass
class _Answer:
    """The parts as they come, from paho's thread."""

    command_id: str
    begun: threading.Event = field(default_factory=threading.Event)
    complete: threading.Event = field(default_factory=threading.Event)
    subscribed: threading.Event = field(default_factory=threading.Event)
    refused: str = ""
    text: str = ""
    parts: dict[int, CommandPart] = field(default_factory=dict)

    def take(self, payload: bytes) -> None:
        """A message on the topic of answers: others' answers are passed over."""
        if len(payload) > MAX_PART_BYTES:
            return
        try:
            part = decode_msgpack(payload, CommandPart)
        except ArtifactError:
            return
        if part.id != self.command_id:
            return
        self.begun.set()
        self.text = part.text
        if part.kind == "result" and 0 <= part.part < part.parts <= MAX_PARTS:
            self.parts[part.part] = part
            if len(self.parts) == part.parts:
                self.complete.set()


def send_command(
    broker: BrokerAddress,
    command: Command,
    envelope: bytes,
    *,
    site: str,
    timeout_s: float,
    on_progress: Callable[[str], None] = lambda _text: None,
) -> CommandResult:
    """Publish a signed command until the device begins, and collect the answer.

    Args:
        broker: where both are.
        command: what was signed.
        envelope: the command, signed.
        site: where the device stands.
        timeout_s: how long to wait for the whole answer.
        on_progress: called with what is waited for.

    Raises:
        EnvironmentFault: ``broker.unreachable`` or ``broker.refused``.
        DeviceError: ``command.silent`` when the device did not answer in time; or the device's own code and words.
        ArtifactError: ``command.damaged`` when the parts do not make what the device sent.
    """
    answer = _Answer(command.id)
    where, back = topic(site, command.device, "cmd"), topic(site, command.device, "rsp")
    client = _connect(broker, back, answer)
    deadline, again = time.monotonic() + timeout_s, 0.0
    on_progress(f"waiting for {site}/{command.device}")
    is_told = False
    try:
        while not answer.complete.wait(_STEP_S):
            now = time.monotonic()
            if answer.refused:
                raise EnvironmentFault(
                    "broker.refused", f"{broker}: {answer.refused}.", hint="Check user, password and rights."
                )
            if now >= deadline:
                raise _silent(command, site, answer, timeout_s)
            if answer.begun.is_set():
                if not is_told:
                    is_told = True
                    on_progress(f"{site}/{command.device} is at it")
            elif now >= again:
                again = now + AGAIN_SECONDS
                client.publish(where, envelope, qos=1)
    finally:
        client.disconnect()
        client.loop_stop()
    return _join(answer, command)


def _connect(broker: BrokerAddress, back: str, answer: _Answer) -> mqtt.Client:
    """A connection that hears the answers."""
    client_id = f"edgekit-command-{secrets.token_hex(4)}"
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5, reconnect_on_failure=True)

    def on_connect(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            answer.refused = f"it refuses this client: {reason}"
            return
        client.subscribe(back, qos=1)

    def on_subscribe(_client: Any, _data: Any, _mid: Any, reasons: Any, _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            answer.refused = f"it does not let this client hear {back}"
        answer.subscribed.set()

    client.on_connect, client.on_subscribe = on_connect, on_subscribe
    client.on_message = lambda _client, _data, message: answer.take(bytes(message.payload))
    if broker.username:
        client.username_pw_set(broker.username, broker.password)
    if (context := broker.tls_context()) is not None:
        client.tls_set_context(context)
    try:
        client.connect(broker.host, broker.port, keepalive=KEEP_ALIVE_SECONDS)
    except OSError as error:
        hint = "Give the --broker that the devices use."
        raise EnvironmentFault("broker.unreachable", f"{broker}: {error.strerror or error}.", hint=hint) from error
    client.loop_start()
    deadline = time.monotonic() + CONNECT_SECONDS
    while not answer.subscribed.wait(_STEP_S) and not answer.refused and time.monotonic() < deadline:
        pass
    if not answer.subscribed.is_set() and not answer.refused:
        answer.refused = "it did not answer"
    return client


def _silent(command: Command, site: str, answer: _Answer, timeout_s: float) -> DeviceError:
    name = f"{site}/{command.device}"
    if answer.begun.is_set():
        return DeviceError(
            "command.silent",
            f"{name}: began {command.kind} and did not end it within {timeout_s:g} s.",
            hint="Give a longer --timeout; the fleet's events tell how it ended.",
        )
    return DeviceError(
        "command.silent",
        f"{name}: no answer within {timeout_s:g} s.",
        hint='Is it online ("edgekit fleet devices"), on this --broker and --site, and given the key of this command?',
    )


def _join(answer: _Answer, command: Command) -> CommandResult:
    last = answer.parts[0]
    if last.code:
        raise DeviceError(last.code, f"{command.device}: {last.text}")
    data = b"".join(answer.parts[number].data for number in range(last.parts))
    if hashlib.sha256(data).hexdigest() != last.digest:
        raise ArtifactError("command.damaged", f"{command.device}: the answer's parts do not make what it sent.")
    return CommandResult(text=last.text, media_type=last.media_type, data=data)
