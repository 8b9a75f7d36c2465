"""Two benchmark runs of different days, model by model.

Models of one run were timed in the same rounds, so their ratios are fair; two runs were not, and the machine has changed in
between. Where both runs hold a model of the same bytes, that is the reference: each model's ratio to it is compared, and what
happened to the machine falls out. Without one only the times themselves can be compared, and a warning says so. Intervals are
bootstrapped within each run, over paired rounds; the noise is that of both runs together.

    >>> compare_runs(read_run(Path("old.json")), read_run(Path("new.json"))).changes[1].change  # doctest: +SKIP
    'slower'
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import hypot

import numpy as np
from numpy.typing import NDArray

from edgekit.benchmark.latency import MIN_NOISE, bootstrap_medians
from edgekit.errors import UsageError
from edgekit.schema.benchmark import BenchmarkRun, Change, ModelChange, RunComparison, ThreadRun

_HINT = "Save both runs with the same models or the same names, or say --match OLD=NEW."
Pairs = list[tuple[str, str]]


def compare_runs(
    old: BenchmarkRun, new: BenchmarkRun, *, matches: Mapping[str, str] | None = None, seed: int = 0
) -> RunComparison:
    """Compare what both runs timed.

    Args:
        old: the earlier run.
        new: the later one.
        matches: names in the new run by names in the old, for models that are called differently.
        seed: draws the resamples.

    Raises:
        UsageError: ``benchmark.no_such_model`` when a match names none; ``benchmark.nothing_in_common`` without a common model
            or thread count.
    """
    pairs = _pair(old, new, dict(matches or {}))
    threads = [run.threads for run in old.runs if any(run.threads == other.threads for other in new.runs)]
    if not pairs or not threads:
        what = "model" if not pairs else "thread count"
        raise UsageError("benchmark.nothing_in_common", f"the two runs have no {what} in common.", hint=_HINT)
    reference = _find_reference(old, new, pairs)
    changes = []
    for count in threads:
        before, after = (next(part for part in run.runs if part.threads == count) for run in (old, new))
        sides = _Side(old, before, seed, reference and reference[0]), _Side(new, after, seed + 1, reference and reference[1])
        changes += [_compare_model(*sides, pair, is_reference=pair == reference) for pair in pairs]
    return RunComparison(
        changes=tuple(changes),
        reference=reference[1] if reference else None,
        warnings=(*_warn_of_reference(old, new, reference), *_warn_of_settings(old, new), *_warn_of_rest(old, new, pairs)),
    )


def _pair(old: BenchmarkRun, new: BenchmarkRun, matches: dict[str, str]) -> Pairs:
    olds, news = ([model.name for model in run.models] for run in (old, new))
    for name, names, which in [(n, olds, "old") for n in matches] + [(n, news, "new") for n in matches.values()]:
        if name not in names:
            message = f"{name}: the {which} run has no such model."
            raise UsageError("benchmark.no_such_model", message, hint=f"Choose from {', '.join(names)}.")
    taken = set(matches.values())
    same = {name: name for name in olds if name in news and name not in matches and name not in taken}
    return [(name, (matches | same)[name]) for name in olds if name in matches or name in same]


def _find_reference(old: BenchmarkRun, new: BenchmarkRun, pairs: Pairs) -> tuple[str, str] | None:
    """A pair of the same bytes, the baseline if possible; None where there is none, or nothing else to compare with it."""
    digests = [{model.name: model.digest for model in run.models} for run in (old, new)]
    same = [pair for pair in pairs if digests[0][pair[0]] == digests[1][pair[1]]]
    if not same or len(pairs) == 1:
        return None
    return min(same, key=lambda pair: (pair[0] != old.baseline) + (pair[1] != new.baseline))


@dataclass(frozen=True)
class _Side:
    """One of the two runs, at one thread count."""

    whole: BenchmarkRun
    run: ThreadRun
    seed: int
    reference: str | None

    def digest_of(self, name: str) -> str:
        return next(model.digest for model in self.whole.models if model.name == name)

    @property
    def noise(self) -> float:
        return max(self.run.reports[self.whole.baseline].noise, MIN_NOISE)

    def medians(self, name: str, *, over: str | None) -> tuple[float, NDArray[np.float64]]:
        """The median time, as a ratio to another model's where one is given; and its bootstrap distribution."""
        names = [name, *([over] if over else [])]
        samples = np.stack([np.asarray(self.run.times_ms[each], dtype=np.float64) for each in names], axis=1)
        resampled = bootstrap_medians(samples, seed=self.seed)
        reports = self.run.reports
        if over is None:
            return reports[name].p50_ms, resampled[:, 0]
        return reports[name].p50_ms / reports[over].p50_ms, resampled[:, 0] / resampled[:, 1]


def _compare_model(old: _Side, new: _Side, pair: tuple[str, str], *, is_reference: bool) -> ModelChange:
    first, last = pair
    over = (None, None) if is_reference else (old.reference, new.reference)
    old_median, old_resampled = old.medians(first, over=over[0])
    new_median, new_resampled = new.medians(last, over=over[1])
    ratio = new_median / old_median
    low, high = (float(value) for value in np.percentile(new_resampled / old_resampled, [2.5, 97.5]))
    noise = hypot(old.noise, new.noise)
    return ModelChange(
        old_name=first,
        new_name=last,
        threads=old.run.threads,
        old_p50_ms=old.run.reports[first].p50_ms,
        new_p50_ms=new.run.reports[last].p50_ms,
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        noise=noise,
        is_corrected=over[0] is not None,
        is_same_file=old.digest_of(first) == new.digest_of(last),
        change="reference" if is_reference else _judge(ratio, low, high, noise),
    )


def _judge(ratio: float, low: float, high: float, noise: float) -> Change:
    if low <= 1 <= high or abs(ratio - 1) <= noise:
        return "tie"
    return "faster" if ratio < 1 else "slower"


def find_slower(comparison: RunComparison, limit: float) -> list[ModelChange]:
    """Models that are slower by more than ``limit`` (1.05 is 5 %), with the whole interval above it."""
    return [change for change in comparison.changes if change.change == "slower" and change.ratio_low > limit]


def _warn_of_reference(old: BenchmarkRun, new: BenchmarkRun, reference: tuple[str, str] | None) -> Iterator[str]:
    if reference is None:
        yield (
            "no model is the same file in both runs to compare with: these are plain times, and a change of the machine looks"
            " like a change of the model; time an unchanged model along in both runs"
        )
    elif reference != (old.baseline, new.baseline):
        yield f"the baselines differ; {reference[1]}, the same file in both runs, is the reference instead"


def _warn_of_settings(old: BenchmarkRun, new: BenchmarkRun) -> Iterator[str]:
    hosts = old.host, new.host
    for what, fields in {
        "another processor": ("arch", "cpu", "isa"),
        "another number of CPUs": ("cores",),
        "another system": ("os",),
        "another governor": ("governor",),
    }.items():
        values = [" ".join(_say(getattr(host, field)) for field in fields) for host in hosts]
        if values[0] != values[1]:
            yield f"{what}: {values[0]}, then {values[1]}"
    runtimes = [
        sorted({f"{r.host.runtime} {r.host.runtime_version}" for r in run.runs[0].reports.values()}) for run in (old, new)
    ]
    if runtimes[0] != runtimes[1]:
        yield f"another runtime: {', '.join(runtimes[0])}, then {', '.join(runtimes[1])}"
    if old.request.batch != new.request.batch:
        yield f"another batch: {old.request.batch}, then {new.request.batch}"
    if (old.request.data is None) != (new.request.data is None):
        yield "only one of the runs used data: the requests differ"


def _warn_of_rest(old: BenchmarkRun, new: BenchmarkRun, pairs: Pairs) -> Iterator[str]:
    counts = [{run.threads: run for run in side.runs} for side in (old, new)]
    alone = sorted(counts[0].keys() ^ counts[1].keys())
    if alone:
        yield f"only in one of the runs, not compared: {', '.join(map(str, alone))} threads"
    for threads in counts[0].keys() & counts[1].keys():
        cpus = [sorted(side[threads].cpus) for side in counts]
        if cpus[0] != cpus[1]:
            said = [f"pinned to CPU {', '.join(map(str, each))}" if each else "not pinned" for each in cpus]
            yield f"{threads} thread{'s' if threads > 1 else ''}: {said[0]}, then {said[1]}"
    for side, which, place in ((old, "old", 0), (new, "new", 1)):
        lone = [model.name for model in side.models if model.name not in {pair[place] for pair in pairs}]
        if lone:
            yield f"only in the {which} run, not compared: {', '.join(lone)}"


def _say(value: object) -> str:
    return "(" + " ".join(map(str, value)) + ")" if isinstance(value, tuple) else str(value or "unknown")
