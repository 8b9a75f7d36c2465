"""The field of ``edgekit demo --drift``: cameras that send real images to their agents, get dirty, and learn the truth late.

The shift is what a lens that collects dust does to every image: less light, a little haze, blur, and the sensor's noise behind
the gain that makes up for it. It grows over time, on each camera at its own pace.

>>> import numpy as np
>>> image = np.ones((1, 28, 28), np.float32)
>>> bool(np.array_equal(dirty(image, 0.0, np.random.default_rng(0)), image))
True
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BLUR, DIMMING, HAZE, NOISE = 0.6, 0.5, 0.05, 0.06
"""At full dirt: pixels of standard deviation, share of the light, of white added, of standard deviation."""
LABEL_DELAY_S = 3.0
LABELLED_SHARE = 0.8
_LABEL_BATCH_S = 1.0


def dirty(image: Array, dirt: float, random: np.random.Generator) -> Array:
    """An image float32 [1, H, W], 0..1, through a lens with so much dirt, 0..1."""
    if dirt <= 0:
        return image
    seen = _blurred(image, BLUR * dirt) * (1 - DIMMING * dirt) + HAZE * dirt
    return np.asarray(np.clip(seen + random.normal(0, NOISE * dirt, image.shape), 0, 1), dtype=np.float32)


def _blurred(image: Array, sigma: float) -> Array:
    reach = max(1, int(np.ceil(2 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    height, width = image.shape[1:]
    wide = np.pad(image, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    rows = sum(weight * wide[:, at : at + height, :] for at, weight in enumerate(kernel))
    return np.asarray(sum(weight * rows[:, :, at : at + width] for at, weight in enumerate(kernel)))


@dataclass(frozen=True)
class Weather:
    """How dirt grows: from a moment on to its end value within a time. Clock: monotonic seconds."""

    begins_s: float = float("inf")
    ramp_s: float = 20.0
    most: float = 0.72

    def dirt(self, now_s: float, pace: float) -> float:
        """On a camera that gathers it at this pace."""
        return float(np.clip((now_s - self.begins_s) / self.ramp_s * pace, 0.0, 1.0)) * self.most


@dataclass(frozen=True)
class Answer:
    """One answered image."""

    at_s: float
    is_right: bool


class Camera:
    """Sends images to one agent at a steady rate over a kept connection; labels come a few seconds later, for most of them."""

    def __init__(
        self,
        *,
        port: int,
        model: str,
        images: Array,
        labels: Array,
        per_second: float,
        pace: float,
        seed: int,
        label_delay_s: float = LABEL_DELAY_S,
    ) -> None:
        self._port, self._model, self._period, self._pace = port, model, 1.0 / per_second, pace
        self._label_delay_s = label_delay_s
        self._images, self._labels = images, labels
        self._random = np.random.default_rng(seed)
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"camera-{port}", daemon=True)
        self._waiting: deque[tuple[float, str, int]] = deque()
        self._told_s = 0.0
        self.weather = Weather()
        self.answers: list[Answer] = []
        self.failed = 0
        self.last_failure = ""

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
            due = max(due + self._period, time.monotonic() - 1.0)  # it does not make up for more than a second
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                self._look(connection)
                self._tell(connection)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.failed += 1
                self.last_failure = f"{type(error).__name__}: {error}"
                connection.close()
        connection.close()

    def _look(self, connection: http.client.HTTPConnection) -> None:
        place = int(self._random.integers(len(self._images)))
        now = time.monotonic()
        image = dirty(self._images[place], self.weather.dirt(now, self._pace), self._random)
        data = np.round(image, 5).ravel().tolist()
        tensor = {"name": "image", "shape": [1, *image.shape], "datatype": "FP32", "data": data}
        result = self._post(connection, "infer", {"inputs": [tensor]})
        logits = result["outputs"][0]["data"]
        label = int(self._labels[place])
        self.answers.append(Answer(now, int(np.argmax(logits)) == label))
        if self._random.random() < LABELLED_SHARE:
            self._waiting.append((now + self._label_delay_s, result["parameters"]["prediction_id"], label))

    def _tell(self, connection: http.client.HTTPConnection) -> None:
        """Send the labels that are known by now."""
        now = time.monotonic()
        if now - self._told_s < _LABEL_BATCH_S:
            return
        self._told_s = now
        known = []
        while self._waiting and self._waiting[0][0] <= now:
            _, prediction, label = self._waiting.popleft()
            known.append({"prediction_id": prediction, "label": label})
        if known:
            self._post(connection, "labels", {"labels": known})

    def _post(self, connection: http.client.HTTPConnection, verb: str, body: Any) -> Any:
        path = f"/v2/models/{self._model}/{verb}"
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        payload = answer.read()
        if answer.status not in {http.HTTPStatus.OK, http.HTTPStatus.ACCEPTED}:
            raise OSError(f"HTTP {answer.status}: {payload[:200]!r}")
        return json.loads(payload)


def accuracy(cameras: Sequence[Camera], begin_s: float, end_s: float) -> tuple[int, float]:
    """Answers between two moments, and the share that was right."""
    found = [each.is_right for camera in cameras for each in camera.answers if begin_s <= each.at_s < end_s]
    return len(found), sum(found) / len(found) if found else float("nan")


def timeline(cameras: Sequence[Camera], begin_s: float, end_s: float, *, step_s: float) -> list[float]:
    """Accuracy by step; NaN where nothing was answered."""
    steps = max(1, round((end_s - begin_s) / step_s))
    return [accuracy(cameras, begin_s + at * step_s, begin_s + (at + 1) * step_s)[1] for at in range(steps)]
