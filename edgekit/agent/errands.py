"""Work that somebody ordered from afar, in a child process that stands back behind the model: the supervisor stays small.

Run as ``python -m edgekit.agent.errands``: an :class:`Errand` comes as JSON on stdin, the result goes to stdout; what goes
wrong is one JSON record on stderr and exit code 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgekit.agent.config import AgentConfig
from edgekit.agent.interpreter import module_command
from edgekit.errors import ArtifactError, DeviceError, EdgekitError, UsageError
from edgekit.schema.base import decode_json, encode_json
from edgekit.schema.command import BenchmarkOrder, CommandKind
from edgekit.schema.digest import hex_of
from edgekit.schema.state import AgentState, Slot

NICE = 15
OOM_SCORE_ADJ = 800
MAX_RESULT_BYTES = 4 << 20
MARGIN_SECONDS = 120.0
JSON = "application/json"
_MARK = b"edgekit-errand-fault "


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """What to do; ``status`` is what the agent says of itself, as JSON."""

    kind: CommandKind
    config: AgentConfig
    status: bytes = b""
    benchmark: BenchmarkOrder = BenchmarkOrder()


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Why it was not done."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of it."""

    media_type: str
    data: bytes


def seconds_of(order: BenchmarkOrder) -> float:
    """The longest that a benchmark may take: each model and its twin, each thread count, and loading."""
    models = max(1, len(order.models)) + 1
    return MARGIN_SECONDS + len(order.threads) * models * (order.seconds + 20.0)


# --- the supervisor's side


async def run_errand(errand: Errand, *, timeout_s: float) -> bytes:
    """Let a child do it; its result.

    Raises:
        DeviceError: what went wrong there, ``command.timeout`` or ``command.too_large``.
    """
    process = await asyncio.create_subprocess_exec(
        *module_command("edgekit.agent.errands"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=MAX_RESULT_BYTES + 1,
        start_new_session=True,
    )
    stand_back(process.pid, nice=NICE, oom_score_adj=OOM_SCORE_ADJ)
    try:
        async with asyncio.timeout(timeout_s):
            data, errors = await process.communicate(encode_json(errand))
    except TimeoutError:
        raise DeviceError("command.timeout", f"{errand.kind} did not end within {timeout_s:g} s.") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # with what it started
            await process.wait()
    if process.returncode == 0 and len(data) <= MAX_RESULT_BYTES:
        return data
    if process.returncode == 0:
        raise DeviceError("command.too_large", f"{errand.kind}: the result has {len(data)} bytes, at most {MAX_RESULT_BYTES}.")
    _, found, record = errors.rpartition(_MARK)
    if found:
        with contextlib.suppress(ArtifactError):
            fault = decode_json(record, Fault)
            raise DeviceError(fault.code, fault.message)
    last = errors.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
    raise DeviceError("command.failed", f"{errand.kind}: {last[0][:500]}")


def stand_back(pid: int, *, nice: int, oom_score_adj: int) -> None:
    """Let a process that was just started come after everybody else, for the processor and when memory is short."""
    with contextlib.suppress(OSError):
        if nice:
            os.setpriority(os.PRIO_PROCESS, pid, nice)
    with contextlib.suppress(OSError):
        if oom_score_adj:
            Path(f"/proc/{pid}/oom_score_adj").write_text(str(oom_score_adj))


# --- the child's side


def carry_out(errand: Errand) -> bytes:
    """Do it here.

    Raises:
        EdgekitError: why it cannot be done.
    """
    match errand.kind:
        case "probe":
            from edgekit.target.probe import probe_target  # noqa: PLC0415 - this errand's own

            return encode_json(probe_target(errand.config.device))
        case "debug":
            from edgekit.agent.debug_bundle import make_bundle  # noqa: PLC0415 - the same

            return make_bundle(errand.config, errand.status)
        case "benchmark":
            return _benchmark(errand.config, errand.benchmark)
        case _:
            raise UsageError("command.no_errand", f"{errand.kind} is not done in a process of its own.")


def state_dirs(config: AgentConfig) -> dict[str, Path]:
    """Each model's state folder."""
    further = {name: config.state_path / "models" / name for name in config.models}
    return {config.model: config.state_path, **further}


def read_state(folder: Path) -> AgentState | None:
    """A model's state as it lies on the disk; None where there is none that can be read."""
    try:
        return decode_json((folder / "state.json").read_bytes(), AgentState)
    except (OSError, ArtifactError):
        return None


def _slots_at(config: AgentConfig) -> list[tuple[Path, Slot, bool]]:
    """Every filled slot with its folder, and whether it serves; those that serve come first."""
    found = []
    for folder in state_dirs(config).values():
        if (state := read_state(folder)) is not None:
            found += [
                (folder, slot, slot.name == state.active) for slot in state.slots if slot.status in {"active", "good", "bad"}
            ]
    return sorted(found, key=lambda each: not each[2])


def _choose(config: AgentConfig, wanted: tuple[str, ...]) -> list[tuple[Path, Slot]]:
    """The slots that hold what is wanted.

    Raises:
        UsageError: ``benchmark.no_such_release`` or ``benchmark.no_models``.
    """
    slots = _slots_at(config)
    held = ", ".join(f"{slot.model}@{slot.version}" for _, slot, _ in slots) or "no model"
    if not wanted:
        serving = [(folder, slot) for folder, slot, is_active in slots if is_active]
        if not serving:
            raise UsageError("benchmark.no_models", f"nothing serves on this device; it holds {held}.")
        return serving[:1]
    chosen = []
    for name in wanted:
        match = next(
            ((folder, slot) for folder, slot, _ in slots if name in {slot.model, f"{slot.model}@{slot.version}"}), None
        )
        if match is None:
            raise UsageError("benchmark.no_such_release", f"{name}: not on this device; it holds {held}.")
        chosen.append(match)
    return chosen


def _benchmark(config: AgentConfig, order: BenchmarkOrder) -> bytes:
    import tempfile  # noqa: PLC0415 - in the child only

    from edgekit.agent.slots import SlotStore  # noqa: PLC0415 - the same
    from edgekit.benchmark.protocol import run_benchmark  # noqa: PLC0415 - numpy
    from edgekit.bundle.opening import opened_variant  # noqa: PLC0415 - the same
    from edgekit.schema.benchmark import BenchmarkRequest  # noqa: PLC0415 - the same

    with tempfile.TemporaryDirectory(prefix="edgekit-benchmark-") as scratch:
        models = []
        for folder, slot in _choose(config, order.models):
            store = SlotStore(folder)
            manifest = store.read_manifest(slot)
            variant = next(each for each in manifest.variants if opened_variant(manifest, each).model == slot.model_digest)
            link = Path(scratch) / f"{slot.model}-{slot.version}-{slot.name}.{variant.format}"
            link.symlink_to(store.blob_dir(slot.name) / hex_of(slot.model_digest or ""))
            models.append(str(link))
        request = BenchmarkRequest(
            models=tuple(models),
            baseline=None,
            data=None,
            threads=order.threads,
            batch=order.batch,
            seconds=order.seconds,
            min_runs=order.runs,
            seed=order.seed,
            is_pinned=None,
        )
        return encode_json(run_benchmark(request))


def main() -> int:
    """The child; its exit code."""
    try:
        errand = msgspec.json.decode(sys.stdin.buffer.read(), type=Errand)
        result = carry_out(errand)
    except EdgekitError as error:
        hint = f" {error.hint}" if error.hint else ""
        sys.stderr.buffer.write(_MARK + msgspec.json.encode(Fault(code=error.code, message=f"{error.message}{hint}")))
        return 1
    sys.stdout.buffer.write(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
