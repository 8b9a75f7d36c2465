"""Who guesses passwords is slowed down; who owns the account is not locked out.

Three counts forget a failure after a quarter of an hour: of an account from one address, of an address, and of an account from
everywhere. Above its allowance each doubles the wait from failure to failure. The third one does not hold for the address from
which the account was last used, so that strangers cannot keep its owner out; and it never asks for more than a minute.

>>> throttle = LoginThrottle()
>>> for second in range(6): throttle.note_failure("lee", "10.0.0.9", now_s=second)
>>> throttle.wait_s("lee", "10.0.0.9", now_s=6.0) > 0, throttle.wait_s("lee", "10.0.0.1", now_s=6.0)
(True, 0.0)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

FORGET_S = 900.0
MAX_KEYS = 20_000
_Key = tuple[str, str]


@dataclass(frozen=True)
class _Allowance:
    free: int
    longest_s: float


_PAIR = _Allowance(free=5, longest_s=900.0)
_ADDRESS = _Allowance(free=20, longest_s=900.0)
_ACCOUNT = _Allowance(free=50, longest_s=60.0)


@dataclass
class _Count:
    failures: float = 0.0
    at_s: float = 0.0

    def now(self, now_s: float) -> float:
        return 0.0 if now_s - self.at_s > FORGET_S else self.failures

    def wait_s(self, allowance: _Allowance, now_s: float) -> float:
        above: float = self.now(now_s) - allowance.free
        if above < 0:
            return 0.0
        wait_s: float = min(2.0 ** min(above, 20.0), allowance.longest_s)
        return max(0.0, self.at_s + wait_s - now_s)


@dataclass
class LoginThrottle:
    """The counts of one server, in memory."""

    _counts: OrderedDict[_Key, _Count] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait_s(self, account: str, address: str, *, now_s: float, is_known_address: bool = False) -> float:
        """Seconds until the next attempt is looked at; 0 for now.

        Args:
            account: the name that was typed, whether or not somebody has it.
            address: where it comes from.
            now_s: a steady clock.
            is_known_address: the account was used from there before.
        """
        asked = [((account, address), _PAIR), (("", address), _ADDRESS)]
        if not is_known_address:
            asked.append(((account, ""), _ACCOUNT))
        with self._lock:
            return max(self._counts.get(key, _Count()).wait_s(allowance, now_s) for key, allowance in asked)

    def note_failure(self, account: str, address: str, *, now_s: float) -> None:
        """A wrong attempt."""
        with self._lock:
            for key in ((account, address), ("", address), (account, "")):
                count = self._counts.pop(key, None) or _Count()
                self._counts[key] = _Count(failures=count.now(now_s) + 1, at_s=now_s)
            while len(self._counts) > MAX_KEYS:
                self._counts.popitem(last=False)

    def note_success(self, account: str, address: str) -> None:
        """A right one: this account is forgiven at this address."""
        with self._lock:
            self._counts.pop((account, address), None)
