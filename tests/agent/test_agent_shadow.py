"""The shadow slot at its seams: who answers live, and who answers beside; the figures decide."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from edgekit.agent.comparison import compare
from edgekit.agent.config import ShadowConfig
from edgekit.agent.link import Compare, Compared, Model, Sample
from edgekit.agent.shadow import ENOUGH, Findings, judge, watch_candidate
from edgekit.bundle.golden import tensor_data
from tests.agent.world import build_manifest

ASKED = ShadowConfig(samples=40, cpu_percent=100.0, max_s=5.0)


def sample(inference_ms=1.0):
    return Sample(model="m", inputs={}, outputs={}, inference_ms=inference_ms)


def answer(*, agreed=True, inference_ms=1.0, error=0.0, delta=0.0, why=""):
    return Compared(is_agreed=agreed, error=error, confidence_delta=delta, inference_ms=inference_ms, why=why)


def findings(count, *, agreed=1.0, inference_ms=1.0, **more):
    found = Findings(**more)
    for number in range(count):
        found.note(sample(), answer(agreed=number < agreed * count, inference_ms=inference_ms))
    return found


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (findings(40), ""),
        (findings(40, agreed=0.95), ""),
        (findings(40, agreed=0.9), "shadow.disagrees"),
        (findings(40, inference_ms=20.0), "shadow.slow"),
        (findings(40, inference_ms=4.0), ""),  # four times as long, and nobody would notice
        (findings(3, is_crashed=True), "shadow.crashed"),
        (findings(ENOUGH, agreed=0.5), "shadow.disagrees"),
        (findings(ENOUGH - 1, agreed=0.0), ""),  # too few to know: the configuration decides
    ],
)
def test_figures_decide(found, code):
    assert judge(found, ASKED).code == code


def test_no_traffic_decided_by_the_configuration():
    waits = ShadowConfig(samples=40, is_switched_without_traffic=False)
    verdict = judge(findings(0), waits)
    assert (verdict.code, verdict.is_final) == ("shadow.no_traffic", False)
    assert judge(findings(0), ASKED).code == ""
    assert findings(0).fields() == {"samples": 0, "seconds": 0.0}


class Live:
    """Answers at once; counts how often it was asked for a copy."""

    def __init__(self, *, is_silent=False):
        self.asked, self.is_silent = 0, is_silent

    async def next_sample(self, model, seconds):
        self.asked += 1
        if self.is_silent:
            await asyncio.sleep(seconds)
            return None
        return sample()


class Candidate:
    """Takes its time, as a process of its own does."""

    def __init__(self, *, answers=None, seconds=0.0):
        self.answers = answers or (answer(),)
        self.seconds, self.busy_s = seconds, 0.0

    async def compare(self, asked, seconds):
        assert asked.model == "m"
        started = time.monotonic()
        await asyncio.sleep(self.seconds)
        self.busy_s += time.monotonic() - started
        return self.answers[0]


def watch(live, candidate, config, **named):
    return asyncio.run(watch_candidate(lambda: live, candidate, "m", config, answer_s=1.0, **named))


def test_as_many_inputs_as_asked_for_and_no_more_than_one_on_its_way():
    live = Live()
    found = watch(live, Candidate(), ASKED)
    assert (found.samples, found.agreement, live.asked) == (40, 1.0, 40)


def test_candidate_keeps_to_its_share_of_the_processor():
    candidate = Candidate(seconds=0.02)
    config = ShadowConfig(samples=5, cpu_percent=20.0, max_s=30.0)
    found = watch(Live(), candidate, config)
    assert candidate.busy_s / found.seconds <= 0.21  # its own clock: what is late makes the share smaller


def test_hopeless_candidate_is_given_up_early():
    found = watch(Live(), Candidate(answers=(answer(agreed=False, why="no output y"),)), ASKED)
    assert found.samples == ENOUGH
    assert "no output y" in judge(found, ASKED).reason


def test_candidate_that_dies_is_refused():
    found = watch(Live(), Candidate(answers=(None,)), ASKED)
    assert (found.is_crashed, judge(found, ASKED).code) == (True, "shadow.crashed")


def test_silence_ends_and_so_does_a_wish_that_changed():
    assert watch(Live(is_silent=True), Candidate(), ShadowConfig(samples=5, max_s=0.2)).samples == 0
    assert watch(Live(), Candidate(), ASKED, is_stopped=lambda: True).samples == 0
    assert watch(None, Candidate(), ShadowConfig(samples=5, max_s=0.2)).samples == 0


# --- the comparison itself


class Session:
    def __init__(self, outputs):
        self.outputs = outputs

    def run(self, feeds):
        if isinstance(self.outputs, Exception):
            raise self.outputs
        return self.outputs


def compared(outputs, given, *, task="classification"):
    import msgspec

    manifest = build_manifest()
    contract = msgspec.structs.replace(manifest.contract, task=task)
    model = Model(
        manifest=msgspec.structs.replace(manifest, contract=contract), variant=manifest.variants[0], blob_dir="nowhere"
    )
    asked = Compare(
        model="m",
        inputs={"x": tensor_data(np.zeros((1, 4), np.float32))},
        outputs={name: tensor_data(np.asarray(value, np.float32)) for name, value in given.items()},
        tolerance=0.05,
    )
    found = outputs if isinstance(outputs, Exception) else {k: np.asarray(v, np.float32) for k, v in outputs.items()}
    return compare(Session(found), model, asked)


def test_same_class_agrees_and_another_does_not():
    given = {"y": [[0.1, 0.7, 0.2]]}
    same = compared({"y": [[0.2, 0.6, 0.2]]}, given)
    assert same.is_agreed
    assert same.confidence_delta == pytest.approx(-0.1, abs=1e-6)
    assert same.error == pytest.approx(0.1 / 0.7, rel=1e-5)
    assert not compared({"y": [[0.8, 0.1, 0.1]]}, given).is_agreed
    assert not compared({"y": [[np.nan, 0.7, 0.1]]}, given).is_agreed


def test_other_models_agree_within_the_tolerance():
    given = {"y": [[1.0, 2.0, 10.0]]}
    assert compared({"y": [[1.4, 2.0, 10.0]]}, given, task="other").is_agreed
    assert not compared({"y": [[1.6, 2.0, 10.0]]}, given, task="other").is_agreed


@pytest.mark.parametrize(
    ("outputs", "why"),
    [({"z": [[1.0]]}, "no output y"), ({"y": [[1.0]]}, "has shape [1, 1]"), (RuntimeError("broken"), "broken")],
)
def test_candidate_that_cannot_answer_says_why(outputs, why):
    found = compared(outputs, {"y": [[1.0, 2.0]]})
    assert not found.is_agreed
    assert why in found.why
