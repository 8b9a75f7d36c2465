"""Sampled inputs: off unless the owner says so, a few a day, redacted, and never more than the day's quota.

    [samples]
    per_day = 20
    max_bytes = 2000000
    redact = ["blur:image:6", "downscale:image:4"]
    k_min = 50

The day is cut into as many slots as samples are allowed, and one input is taken at a random moment of each, so that a busy hour
does not eat the day. ``k_min``: an input is only given when its answer was given that often before, so that the odd one out
stays at home. The quota is on the disk before an input is asked for: neither a restart nor a power cut gives a second one.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgekit.agent.config import SamplesConfig
from edgekit.agent.link import Sampled, TakeSample
from edgekit.durable import PRIVATE_FILE, write_durably
from edgekit.schema.message import InputSample

logger = logging.getLogger(__name__)

FILE = "samples.json"
DAY_S = 86400.0
MAX_SAMPLE_BYTES = 200_000
"""So that one sample is one message."""


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """What was given on a day, in days since 1970 by the device's clock."""

    day: int = 0
    count: int = 0
    size_bytes: int = 0


@dataclass
class SampleDesk:
    """Asks for inputs, and keeps the quota. Used from the loop's thread."""

    config: SamplesConfig
    folder: Path
    ask: Callable[[str, TakeSample], None]
    """Tells the worker of a model to give its next input."""
    models: Callable[[], Sequence[str]]
    """Names of the models that serve."""
    store: Callable[[InputSample], None]
    now_s: Callable[[], float] = time.time
    draw: Callable[[], float] = random.random
    quota: Quota = field(default_factory=Quota)
    _turn: int = 0

    def __post_init__(self) -> None:
        try:
            self.quota = msgspec.json.decode((self.folder / FILE).read_bytes(), type=Quota)
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError) as error:
            logger.error("event=quota_unreadable error=%r", str(error))  # noqa: TRY400 - fails closed for today
            self.quota = Quota(day=self._today(), count=self.config.per_day)

    def _today(self) -> int:
        return int(self.now_s() // DAY_S)

    def _left(self) -> int:
        """How many bytes may still be given today; 0 when none, or no more samples. A clock that went back gives no new day."""
        if self._today() > self.quota.day:
            self.quota = Quota(day=self._today())
        if self.quota.count >= self.config.per_day:
            return 0
        return min(MAX_SAMPLE_BYTES, self.config.max_bytes - self.quota.size_bytes)

    def _save(self, quota: Quota) -> None:
        write_durably(self.folder / FILE, msgspec.json.encode(quota), mode=PRIVATE_FILE)
        self.quota = quota

    def take_turn(self) -> bool:
        """Ask the next model for an input, if the quota has room; whether one was asked."""
        names, left = self.models(), self._left()
        if not names or left <= 0:
            return False
        self._save(msgspec.structs.replace(self.quota, count=self.quota.count + 1))
        name = names[self._turn % len(names)]
        self._turn += 1
        self.ask(name, TakeSample(model=name, redact=self.config.redact, max_bytes=left, k_min=self.config.k_min))
        return True

    def receive(self, sampled: Sampled) -> None:
        """An input came: it counts, and goes into the spool."""
        size = sum(len(tensor.data) for tensor in sampled.tensors)
        if size > max(0, self.config.max_bytes - self.quota.size_bytes) or not self.config.per_day:
            logger.warning("event=sample_over_quota bytes=%d", size)
            return
        self._save(msgspec.structs.replace(self.quota, size_bytes=self.quota.size_bytes + size))
        self.store(
            InputSample(
                boot=0,
                seq=0,
                time_ms=0,
                model_digest=sampled.model_digest.removeprefix("sha256:")[:12],
                prediction_id=sampled.prediction_id,
                tensors=sampled.tensors,
                predicted=sampled.predicted,
                confidence=sampled.confidence,
                redacted=sampled.redacted,
            )
        )

    async def run(self) -> None:
        """Take turns, one a slot of the day, for ever."""
        slot_s = DAY_S / self.config.per_day
        while True:
            moment_s = self.draw() * slot_s
            await asyncio.sleep(moment_s)
            try:
                self.take_turn()
            except OSError as error:
                logger.error("event=quota_not_saved error=%r", str(error))  # noqa: TRY400 - no quota, no sample
            await asyncio.sleep(slot_s - moment_s)
