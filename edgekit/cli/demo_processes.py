"""The demonstration's real processes, and the load on them.

Every program is started as a user would start it (``python -m edgekit ...``), logs into its own file and is ended by its id.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.errors import EnvironmentFault, OperationError

_STOP_SECONDS = 15.0


def free_port(preferred: int) -> int:
    """The preferred loopback port if nothing listens there, else one that the system gives."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise EnvironmentFault("port.none_free", "no loopback port is free.", hint="Stop a server that you do not need.")


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str, log: Path | None = None) -> None:
    """Wait for a condition.

    Raises:
        OperationError: ``demo.timeout`` with the end of the log when it does not come true in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log and log.is_file() else ""
    message = f"{what} did not happen within {seconds:.0f} s.{chr(10) + tail if tail else ''}"
    raise OperationError("demo.timeout", message, hint=f"See {log}." if log else "")


def get_json(url: str) -> Any:
    """GET a JSON document from loopback; None while the server is not there or says no."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - loopback URLs that the demonstration built
            return json.loads(answer.read())
    except (OSError, urllib.error.URLError, ValueError, http.client.HTTPException):
        return None


@dataclass
class Program:
    """One started program."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def is_running(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None


@dataclass
class Programs:
    """Every program of the demonstration; ended in reverse order."""

    log_dir: Path
    started: list[Program] = field(default_factory=list)

    def start(self, name: str, *arguments: str) -> Program:
        """Start ``edgekit ARGUMENTS`` in a session of its own, so that Ctrl-C reaches the demonstration only."""
        log = self.log_dir / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(  # noqa: S603 - our own program with arguments that we built
                [sys.executable, "-m", "edgekit", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
            )
        program = Program(name=name, process=process, log=log)
        self.started.append(program)
        return program

    def stop(self) -> None:
        """End every program: SIGTERM, and SIGKILL for what does not end in time."""
        for program in reversed(self.started):
            if program.is_running:
                program.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        for program in reversed(self.started):
            try:
                program.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                program.process.kill()
                program.process.wait()
        self.started.clear()


def run_edgekit(*arguments: str, log: Path | None = None, ok: Sequence[int] = (0,)) -> str:
    """Run ``edgekit ARGUMENTS`` to its end; its progress goes to our stderr, or to a log.

    Returns:
        What it wrote to stdout.

    Raises:
        OperationError: ``demo.step_failed`` when it ends with another code than those in ``ok``.
    """
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(log.open("ab")) if log else None
        done = subprocess.run(  # noqa: S603 - our own program with arguments that we built
            [sys.executable, "-m", "edgekit", *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True, check=False
        )
    if done.returncode not in ok:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log else ""
        raise OperationError("demo.step_failed", f"edgekit {' '.join(arguments)}: ended with {done.returncode}.\n{tail}")
    return done.stdout


class Load:
    """Real images through an agent's inference API, at a steady rate, over one kept connection.

    Open loop: requests have due times, so a slow answer delays nothing that is measured: latency counts from the due time.
    """

    def __init__(self, port: int, model: str, images: Any, labels: Any, *, per_second: float) -> None:
        self._port, self._model, self._period = port, model, 1.0 / per_second
        self._images, self._labels = images, labels
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"load-{port}", daemon=True)
        self.sent = self.failed = self.correct = 0
        self.last_failure = ""
        self.latencies_ms: list[float] = []
        self.by_digest: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the request in flight."""
        self._halt.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        due = time.monotonic()
        while not self._halt.is_set():
            due += self._period
            time.sleep(max(0.0, due - time.monotonic()))
            self._send(connection, due)
        connection.close()

    def _send(self, connection: http.client.HTTPConnection, due: float) -> None:
        index = self.sent % len(self._images)
        image = self._images[index]
        tensor = {
            "name": "image",
            "shape": [1, *image.shape],
            "datatype": "FP32",
            "data": [round(float(v), 6) for v in image.ravel()],
        }
        body = json.dumps({"inputs": [tensor]})
        self.sent += 1
        try:
            result = self._exchange(connection, body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.failed += 1
            self.last_failure = f"{type(error).__name__}: {error}"
            connection.close()
            return
        self.latencies_ms.append((time.monotonic() - due) * 1000)
        logits = result["outputs"][0]["data"]
        self.correct += int(max(range(len(logits)), key=logits.__getitem__) == int(self._labels[index]))
        self.by_digest[result["parameters"]["model_digest"]] += 1

    def _exchange(self, connection: http.client.HTTPConnection, body: str) -> Any:
        """One request and its answer; anything but 200 is an error."""
        connection.request("POST", f"/v2/models/{self._model}/infer", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        payload = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise OSError(f"HTTP {answer.status}: {payload[:200]!r}")
        return json.loads(payload)
