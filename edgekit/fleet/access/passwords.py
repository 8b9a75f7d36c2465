"""Passwords: argon2id with RFC 9106's parameters for machines with little memory; never kept, never logged.

A wrong password and an unknown name cost the same time: for a name that nobody has the password is compared with a hash that
nothing fits. Few are hashed at once, since each takes 64 MiB.

>>> is_right(hash_password("correct horse battery"), "correct horse battery")
True
>>> is_right("", "anything")
False
"""

from __future__ import annotations

import secrets
import threading
from functools import cache

from argon2 import PasswordHasher, profiles
from argon2.exceptions import InvalidHashError, VerificationError

from edgekit.errors import UsageError

MIN_LENGTH = 10
MAX_LENGTH = 512
MAX_AT_ONCE = 2
_hasher = PasswordHasher.from_parameters(profiles.RFC_9106_LOW_MEMORY)
_places = threading.BoundedSemaphore(MAX_AT_ONCE)


@cache
def _hash_of_nothing() -> str:
    return _hasher.hash(secrets.token_hex(32))


def check_password(password: str, *, name: str = "") -> None:
    """Refuse what is guessed first: length decides, not symbols (NIST SP 800-63B).

    Raises:
        UsageError: ``access.password``.
    """
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        raise UsageError(
            "access.password",
            f"the password has {len(password)} characters: {MIN_LENGTH} to {MAX_LENGTH} are asked for.",
            hint="A sentence is easy to remember and hard to guess.",
        )
    if len(set(password)) < 4 or (name and password.casefold().strip() == name.casefold()):
        raise UsageError("access.password", "the password is one of the first that are guessed.", hint="Take a sentence.")


def hash_password(password: str) -> str:
    """A salted hash with its parameters, about 100 characters."""
    with _places:
        return _hasher.hash(password)


def is_right(stored: str, password: str) -> bool:
    """Whether a password fits a hash; an empty hash fits nothing and takes as long."""
    with _places:
        try:
            return _hasher.verify(stored or _hash_of_nothing(), password[:MAX_LENGTH]) and bool(stored)
        except (VerificationError, InvalidHashError):
            return False


def is_outdated(stored: str) -> bool:
    """Whether a hash was made with other parameters than today's."""
    return _hasher.check_needs_rehash(stored)
