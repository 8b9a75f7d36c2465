"""Messages in, answers out: topics whose payloads are run through a model, or pushed into a stream of features.

    [[inference_topics]]
    subscribe = "sensors/+/frame"      # wildcards as in MQTT
    model = "kws"
    publish = "predictions/{1}"        # {1}: what the first wildcard stood for; empty: only to the request's response topic
    format = "tensor"                  # v2: the protocol's request; tensor: raw bytes of the one input; rows: for a stream

The payload goes to the serving worker over the agent's own socket and comes back as the protocol's JSON, with the digest of the
model that answered. MQTT 5's response topic comes before ``publish``, correlation data travel along. What the model cannot keep
up with is bounded: the oldest message goes, and is counted. The broker may deliver a message twice; then it is answered twice.
"""

from __future__ import annotations

import asyncio
import collections
import http.client
import json
import logging
import math
import socket
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, assert_never

from edgekit.agent.config import InferenceTopic
from edgekit.agent.mqtt import Incoming

logger = logging.getLogger(__name__)

MAX_WAITING = 64
ASK_SECONDS = 35.0
_SIZES = {"BOOL": 1, "INT8": 1, "UINT8": 1, "INT16": 2, "UINT16": 2, "FP16": 2, "INT32": 4, "UINT32": 4, "FP32": 4}
_OK = 200

Sender = Callable[..., bool]
"""``Courier.answer``: topic, payload, correlation; whether it is on its way."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass
class InferenceDesk:
    """The thread between the broker and the worker.

    Args:
        topics: what is listened to, and what becomes of it.
        address: host and port of the agent's own server.
        socket_path: its Unix socket, which is taken where there is one.
        send: publishes an answer; called in the loop's thread.
    """

    topics: Sequence[InferenceTopic]
    address: tuple[str, int]
    socket_path: str
    send: Sender
    answered: int = 0
    failed: int = 0
    dropped: int = 0
    _waiting: collections.deque[tuple[InferenceTopic, Incoming]] = field(default_factory=collections.deque)
    _lock: threading.Condition = field(default_factory=threading.Condition)
    _is_stopping: bool = False
    _thread: threading.Thread | None = None
    _line: http.client.HTTPConnection | None = None
    _shapes: dict[str, tuple[str, str, tuple[int, ...]]] = field(default_factory=dict)

    def start(self) -> None:
        """Begin to answer."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="mqtt-inference", daemon=True)
        self._thread.start()

    def hear(self, topic: InferenceTopic, message: Incoming) -> None:
        """One message; in the loop's thread."""
        with self._lock:
            self._waiting.append((topic, message))
            if len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self.dropped += 1
                if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, 8 ...: a flood of them is not a flood of lines
                    logger.warning("event=inference_messages_dropped count=%d", self.dropped)
            self._lock.notify()

    def stop(self) -> None:
        """End the thread; what waits is not answered."""
        with self._lock:
            self._is_stopping = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join(1.0)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._is_stopping:
                    self._lock.wait()
                if self._is_stopping:
                    return
                topic, message = self._waiting.popleft()
            try:
                status, body = self._answer(topic, message.payload)
            except (OSError, http.client.HTTPException, ValueError) as error:
                status, body = (
                    0,
                    json.dumps({"error": f"the agent could not answer: {error}", "code": "agent.unreachable"}).encode(),
                )
                self._close()
            self.answered, self.failed = self.answered + (status == _OK), self.failed + (status != _OK)
            where = message.response_topic or fill_topic(topic, message.topic)
            if where:
                try:
                    loop.call_soon_threadsafe(lambda w=where, b=body, c=message.correlation: self.send(w, b, correlation=c))  # type: ignore[misc]
                except RuntimeError:  # the loop ended
                    return

    # --- asking the worker

    def _answer(self, topic: InferenceTopic, payload: bytes) -> tuple[int, bytes]:
        """The worker's answer to one payload: HTTP status and JSON."""
        name = urllib.parse.quote(topic.model, safe="")
        match topic.format:
            case "rows":
                return self._ask("POST", f"/v2/streams/{urllib.parse.quote(topic.stream or topic.model, safe='/')}", payload)
            case "v2":
                return self._ask("POST", f"/v2/models/{name}/infer", payload)
            case "tensor":
                return self._infer_tensor(name, payload)
            case _:
                assert_never(topic.format)

    def _infer_tensor(self, name: str, payload: bytes) -> tuple[int, bytes]:
        if name not in self._shapes:
            status, body = self._ask("GET", f"/v2/models/{name}")
            if status != _OK:
                return status, body
            self._shapes[name] = _only_input(json.loads(body))
        tensor, datatype, shape = self._shapes[name]
        size = math.prod(shape) * _SIZES[datatype]
        if len(payload) != size:
            self._shapes.pop(name)  # another release may have another shape
            message = f"input {tensor}: {len(payload)} B, shape {list(shape)} {datatype} needs {size} B"
            return 400, json.dumps({"error": message, "code": "data.shape"}).encode()
        entry = {"name": tensor, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(payload)}}
        head = json.dumps({"inputs": [entry]}).encode()
        return self._ask(
            "POST", f"/v2/models/{name}/infer", head + payload, {"inference-header-content-length": str(len(head))}
        )

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """One request; tried again on a new connection where a swap ended the old one."""
        for is_last in (False, True):
            line = self._line = self._line or self._connection()
            try:
                line.request(method, path, body, headers or {})
                answer = line.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                self._close()
                if is_last:
                    raise
        raise AssertionError("unreachable")

    def _connection(self) -> http.client.HTTPConnection:
        if self.socket_path:
            return _UnixConnection(self.socket_path, ASK_SECONDS)
        return http.client.HTTPConnection(*self.address, timeout=ASK_SECONDS)

    def _close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None


def _only_input(described: dict[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    """Name, type and shape of a model's one input, a batch of one.

    Raises:
        ValueError: when it has several, or an axis besides the batch that is not fixed.
    """
    inputs = described["inputs"]
    shape = tuple(inputs[0]["shape"])
    fixed = tuple(1 if index == 0 and axis < 0 else axis for index, axis in enumerate(shape))
    if len(inputs) != 1 or min(fixed, default=1) < 0 or inputs[0]["datatype"] not in _SIZES:
        raise ValueError(f"{described.get('name')}: format tensor needs a model with one input of a fixed shape; use v2")
    return str(inputs[0]["name"]), str(inputs[0]["datatype"]), fixed


def fill_topic(topic: InferenceTopic, heard: str) -> str:
    """Where an answer is published: ``{1}`` is what the first wildcard stood for, and so on; empty for nowhere.

    >>> fill_topic(InferenceTopic(subscribe="a/+/b/#", model="m", publish="out/{1}/{2}"), "a/x/b/y/z")
    'out/x/y/z'
    """
    found: list[str] = []
    levels = heard.split("/")
    for index, level in enumerate(topic.subscribe.split("/")):
        if level == "+":
            found.append(levels[index])
        elif level == "#":
            found.append("/".join(levels[index:]))
    where = topic.publish
    for number, text in enumerate(found, 1):
        where = where.replace(f"{{{number}}}", text)
    return where
