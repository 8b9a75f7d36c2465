"""The fetcher that python-tuf's client uses: our transport behind ``FetcherInterface``.

Metadata is small and stays in memory (python-tuf's own fetcher spools to a temporary file). Every way in which a download can
break becomes a ``DownloadError``, which python-tuf's own fetcher does not manage for a connection that is cut mid-body.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, SlowRetrievalError
from tuf.ngclient import FetcherInterface  # type: ignore[attr-defined]

from edgekit.trust.transport import Transport, TransportError


class BoundedFetcher(FetcherInterface):
    """Fetches metadata with bounds.

    Args:
        transport: the connections.
        deadline_s: the longest that one file may take.
    """

    def __init__(self, transport: Transport, *, deadline_s: float = 60.0) -> None:
        self._transport, self._deadline_s = transport, deadline_s
        self.received_bytes = 0
        """Body bytes of all files so far."""

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._chunks(url, max_bytes=1 << 31)

    @contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """A file of at most ``max_length`` bytes, in memory."""
        yield io.BytesIO(b"".join(self._chunks(url, max_bytes=max_length)))

    def _chunks(self, url: str, *, max_bytes: int) -> Iterator[bytes]:
        deadline = time.monotonic() + self._deadline_s
        try:
            with self._transport.get(url, ok=frozenset({200})) as answer:
                for chunk in answer.chunks(max_bytes=max_bytes):
                    self.received_bytes += len(chunk)
                    if time.monotonic() > deadline:
                        raise SlowRetrievalError(f"{url}: not complete after {self._deadline_s:.0f} s")
                    yield chunk
        except TransportError as error:
            raise _download_error(error) from error


def _download_error(error: TransportError) -> DownloadError:
    match error.fault:
        case "status":
            return DownloadHTTPError(str(error), error.status)
        case "too_long":
            return DownloadLengthMismatchError(str(error))
        case "slow":
            return SlowRetrievalError(str(error))
        case _:
            return DownloadError(str(error))
