"""The field of the drift demonstration; the whole of it is run by hand and by CI (``edgekit demo --drift --once``)."""

from __future__ import annotations

import http.server
import json
import threading
import time

import numpy as np
import pytest

from edgekit.cli.demo_drift import spark
from edgekit.cli.demo_field import Answer, Camera, Weather, accuracy, dirty, timeline


def test_dirt_takes_light_and_detail_and_stays_an_image():
    random = np.random.default_rng(0)
    image = np.zeros((1, 28, 28), np.float32)
    image[:, 8:20, 8:20] = 1
    before = image.copy()
    seen = [dirty(image, dirt, random) for dirt in (0.0, 0.5, 1.0)]
    assert np.array_equal(image, before)
    assert seen[0] is image
    assert all(each.dtype == np.float32 and each.shape == image.shape for each in seen)
    assert all(each.min() >= 0 and each.max() <= 1 for each in seen)
    assert seen[0].mean() > seen[1].mean() > seen[2].mean()
    assert seen[0].std() > seen[1].std() > seen[2].std()


def test_dirt_grows_at_each_cameras_pace_to_its_end():
    weather = Weather(begins_s=100.0, ramp_s=20.0, most=0.7)
    assert weather.dirt(99.0, 1.0) == 0
    assert weather.dirt(110.0, 1.0) == pytest.approx(0.35)
    assert weather.dirt(110.0, 1.2) == pytest.approx(0.42)
    assert weather.dirt(500.0, 0.8) == pytest.approx(0.7)
    assert Weather().dirt(1e12, 1.0) == 0


class Agent(http.server.BaseHTTPRequestHandler):
    """Answers class 1 to everything, and takes labels as an agent does: with 202."""

    protocol_version = "HTTP/1.1"
    labels: list

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/labels"):
            self.labels.extend(body["labels"])
            status, said = 202, {"counted": len(body["labels"]), "forwarded": 0}
        else:
            status = 200
            said = {"outputs": [{"data": [0.0, 1.0]}], "parameters": {"prediction_id": f"p{time.monotonic_ns()}"}}
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def test_camera_counts_answers_and_labels_come_later():
    handler = type("Handler", (Agent,), {"labels": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    images, labels = np.zeros((4, 1, 2, 2), np.float32), np.array([0, 1, 1, 1])
    camera = Camera(
        port=server.server_port, model="m", images=images, labels=labels, per_second=200.0, pace=1.0, seed=0, label_delay_s=0.2
    )
    begin = time.monotonic()
    camera.start()
    deadline = begin + 20
    while not handler.labels and time.monotonic() < deadline:
        time.sleep(0.02)
    camera.stop()
    server.shutdown()
    server.server_close()
    assert (camera.failed, camera.last_failure) == (0, "")
    count, right = accuracy([camera], begin, time.monotonic())
    assert count == len(camera.answers) > 20
    assert 0.5 < right < 1.0
    assert {each["label"] for each in handler.labels} <= {0, 1}
    assert 0 < len(handler.labels) < count


def test_accuracy_over_time_is_drawn():
    camera = Camera(port=1, model="m", images=np.zeros(1), labels=np.zeros(1), per_second=1, pace=1, seed=0)
    camera.answers = [Answer(0.5, True), Answer(1.5, True), Answer(1.6, False), Answer(3.5, False)]
    assert accuracy([camera], 0, 4) == (4, 0.5)
    assert spark(timeline([camera], 0, 4, step_s=1.0)) == "█▅·▁"
