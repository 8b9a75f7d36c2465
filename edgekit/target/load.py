"""Target profiles by name or from a file, checked with typo hints.

>>> load_target("raspberry-pi-4").arch
'aarch64'
"""

from __future__ import annotations

import difflib
import math
import tomllib
import types
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from edgekit.errors import UsageError
from edgekit.schema.base import encode_json
from edgekit.schema.digest import digest_bytes
from edgekit.schema.target import TargetProfile
from edgekit.target.probe import ISA_FLAGS, probe_target

HOST_NAMES = ("host", "this-machine")
_CLOSE = 0.6
_SHORTEST_PART = 3


def profiles_dir() -> Path:
    """Where the shipped profiles are: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parents[1] / "targets"


def _plain(word: str) -> str:
    return word.lower().translate(str.maketrans("", "", "-_ "))


def _nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean "…"?``, or nothing; ``pi4`` finds ``raspberry-pi-4``."""
    names = {_plain(name): name for name in known}
    wanted = _plain(word)
    found = difflib.get_close_matches(wanted, names, n=1, cutoff=_CLOSE) or [
        name for name in names if len(wanted) >= _SHORTEST_PART and wanted in name
    ]
    return f'did you mean "{names[found[0]]}"?' if found else ""


def _struct_of(hint: Any) -> type[msgspec.Struct] | None:
    """The struct type inside a field's type, if there is one."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint
    if get_origin(hint) in (Union, types.UnionType):
        return next((found for part in get_args(hint) if (found := _struct_of(part))), None)
    return None


def _check_keys(table: dict[str, Any], kind: type[msgspec.Struct], source: str, prefix: str = "") -> None:
    """Refuse unknown keys, with the nearest known one."""
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key not in kind.__struct_fields__:
            nearest = _nearest(key, kind.__struct_fields__)
            message = f'{source}: unknown key "{prefix}{key}"' + (f"; {nearest}" if nearest else ".")
            raise UsageError("target.unknown_key", message, hint=f"Known keys: {', '.join(kind.__struct_fields__)}.")
        inner = _struct_of(hints[key])
        if inner and isinstance(value, dict):
            _check_keys(value, inner, source, f"{prefix}{key}.")


def parse_target(text: str, *, source: str) -> TargetProfile:
    """A profile from TOML.

    Args:
        text: the TOML.
        source: the file's name, for messages.

    Raises:
        UsageError: ``target.malformed``, ``target.unknown_key`` or ``target.invalid``.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            "target.malformed", f"{source}: not valid TOML: {error}.", hint="Fix the line that it names."
        ) from error
    _check_keys(table, TargetProfile, source)
    try:
        profile = msgspec.convert(table, TargetProfile)
    except msgspec.ValidationError as error:
        hint = "Compare with a shipped profile: edgekit target show raspberry-pi-4."
        raise UsageError("target.invalid", f"{source}: {error}.", hint=hint) from error
    _check_sense(profile, source)
    return profile


def _check_sense(profile: TargetProfile, source: str) -> None:
    """Facts that a type cannot say."""
    known = TargetProfile.__struct_fields__
    strange = next((flag for flag in profile.isa if flag not in ISA_FLAGS[profile.arch]), None)
    if strange is not None:
        flags = ISA_FLAGS[profile.arch]
        nearest = _nearest(strange, flags)
        message = f'{source}: isa has unknown flag "{strange}" for {profile.arch}' + (f"; {nearest}" if nearest else ".")
        raise UsageError("target.invalid", message, hint=f"The flags that choose kernels there: {', '.join(flags)}.")
    faults = [
        (profile.cores < 1, "cores must be at least 1"),
        (not 1 <= profile.threads <= profile.cores, f"threads must be 1 to {profile.cores}, the number of cores"),
        *(
            (value is not None and not 0 < value < math.inf, f"{name} must be a positive number")
            for name, value in (("ram_mb", profile.ram_mb), ("flash_mb", profile.flash_mb), ("clock_mhz", profile.clock_mhz))
        ),
        ((profile.arch == "armv7e-m") != (profile.runtime == "tflm"), "arch armv7e-m and runtime tflm need each other"),
        (profile.channel_multiple < 1, "channel_multiple must be at least 1"),
        (
            profile.runtime == "onnxruntime" and profile.int8.format == "litert",
            "int8.format litert needs runtime litert or tflm",
        ),
        (profile.runtime != "onnxruntime" and profile.int8.format != "litert", "int8.format must be litert for this runtime"),
        (not profile.sources, "sources must name where the facts come from"),
        *((name.split(".")[0] not in known, f"sources.{name} names no field") for name in profile.sources),
    ]
    for is_fault, message in faults:
        if is_fault:
            raise UsageError(
                "target.invalid", f"{source}: {message}.", hint="Correct the profile and run edgekit target check."
            )


def load_target(name_or_path: str) -> TargetProfile:
    """A shipped profile by name, a profile file by path, or ``host``: this machine, probed now.

    Raises:
        UsageError: ``target.unknown`` with the nearest name, or what :func:`parse_target` raises.
    """
    if name_or_path in HOST_NAMES:
        return probe_target()
    path = Path(name_or_path)
    if path.suffix == ".toml":
        return _load_file(path)
    names = _names()
    if name_or_path not in names:
        nearest = _nearest(name_or_path, [*names, *HOST_NAMES])
        hint = f"{nearest} See them all with: edgekit target list".strip()
        raise UsageError("target.unknown", f"{name_or_path}: no such target.", hint=hint)
    return _load_named(name_or_path)


def find_latency_table(profile: TargetProfile, name_or_path: str) -> Path | None:
    """The latency table that a profile names, beside the file that it was loaded from; None where it names none."""
    if not profile.latency_table:
        return None
    path = Path(name_or_path)
    return (path.parent if path.suffix == ".toml" else profiles_dir()) / profile.latency_table


def _load_file(path: Path) -> TargetProfile:
    if not path.is_file():
        raise UsageError("target.not_found", f"{path}: there is no such file.", hint="Check the path.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "target.malformed", f"{path}: cannot be read as UTF-8 text: {error}.", hint="Check the file."
        ) from error
    return parse_target(text, source=str(path))


def _names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in profiles_dir().glob("*.toml")))


@cache
def _load_named(name: str) -> TargetProfile:
    path = profiles_dir() / f"{name}.toml"
    return parse_target(path.read_text(encoding="utf-8"), source=path.name)


def list_targets() -> tuple[TargetProfile, ...]:
    """Every shipped profile, by name."""
    return tuple(_load_named(name) for name in _names())


def target_digest(profile: TargetProfile) -> str:
    """The digest of a profile's content."""
    return digest_bytes(encode_json(profile))
