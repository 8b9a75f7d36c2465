"""The whole error tree: who can act decides the class, the code is stable, the hint says what to do.

    EdgekitError
    ├── UsageError        the caller: wrong argument, configuration or budget             exit 2
    │   └── DataError     the caller's data: shape, type, NaN, empty, labels              exit 2
    ├── OperationError                                                                    exit 3
    │   ├── TargetError       the target cannot do what was asked
    │   ├── ArtifactError     a model, bundle or record is damaged or unsupported
    │   ├── RepositoryError   the update repository is missing, inconsistent or unreachable
    │   ├── DeviceError       the device refused or failed (disk, memory, self-test)
    │   └── EnvironmentFault  this machine: a missing package, a port in use, no broker
    └── TrustError        a signature, digest, expiry or version was refused              exit 4

A message says what happened, to which input, and what was expected; the hint says what to do. Codes are
``family.condition`` and do not change between releases.

    >>> str(UsageError("target.unknown", "rasberry-pi-4: no such target.", hint='did you mean "raspberry-pi-4"?'))
    'rasberry-pi-4: no such target.'
"""

from __future__ import annotations

from typing import ClassVar


class EdgekitError(Exception):
    """Base of every error that edgekit raises on purpose.

    Args:
        code: stable ``family.condition``, for programs.
        message: what happened, to which input, what was expected.
        hint: what to do about it.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.code, self.message, self.hint))


def _rebuild(kind: type[EdgekitError], code: str, message: str, hint: str) -> EdgekitError:
    return kind(code, message, hint=hint)


class UsageError(EdgekitError):
    """The caller's argument, configuration or budget is wrong."""

    exit_code = 2


class DataError(UsageError):
    """The caller's data does not fit: shape, type, NaN, no samples, labels of another length."""


class OperationError(EdgekitError):
    """The operation could not be done."""


class TargetError(OperationError):
    """The target cannot do what was asked of it."""


class ArtifactError(OperationError):
    """A model, a bundle or a record is damaged or unsupported."""


class RepositoryError(OperationError):
    """The update repository is missing, inconsistent or cannot be reached."""


class DeviceError(OperationError):
    """The device refused or failed: disk, memory, self-test."""


class EnvironmentFault(OperationError):
    """This machine lacks something: a package, a free port, a broker."""


class TrustError(EdgekitError):
    """A signature, digest, expiry date or version was refused."""

    exit_code = 4
