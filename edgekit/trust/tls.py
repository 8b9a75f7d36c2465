"""TLS of a server whose certificate, authorities and revocation lists change while it runs.

The files are looked at with every handshake, and read anew when one of them has changed: a certificate that was renewed is
shown to the next client, one that was revoked is refused from then on. Sessions are not resumed where clients have
certificates, since a resumed one is not looked at again. A file that cannot be read leaves what was there, and is logged.

    context = ServerTls(cert=Path("server.pem"), key=Path("server.key"), client_ca=Path("devices.pem")).context()
"""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.errors import UsageError

logger = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """The files of a server.

    Args:
        cert: its certificate chain, PEM.
        key: its key, PEM, without a password.
        client_ca: authorities of clients; None asks no client for a certificate.
        crl: revocation lists, one of each of those authorities; None looks at none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None
    crl: Path | None = None
    _current: dict[str, ssl.SSLContext] = field(default_factory=dict)
    _stamp: list[_Stamp] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def files(self) -> tuple[Path, ...]:
        """All that are given."""
        return tuple(path for path in (self.cert, self.key, self.client_ca, self.crl) if path is not None)

    def context(self) -> ssl.SSLContext:
        """What sockets are wrapped with; it keeps itself up to date.

        Raises:
            UsageError: ``tls.files``.
        """
        if self.crl is not None and self.client_ca is None:
            raise UsageError("tls.files", "a revocation list without the authority of clients.", hint="Give --client-ca, too.")
        try:
            stamp = self._look()
            first = self._load()
        except OSError as error:  # ssl's errors are among them
            names = ", ".join(map(str, self.files))
            raise UsageError(
                "tls.files",
                f"{names}: cannot be used: {error}.",
                hint="Give certificates, key and revocation lists in PEM, the key unencrypted and fitting the certificate.",
            ) from error
        self._current["now"] = first
        self._stamp[:] = [stamp]
        first.sni_callback = self._on_hello
        return first

    def _look(self) -> _Stamp:
        stats = [path.stat() for path in self.files]
        return tuple((each.st_mtime_ns, each.st_ino, each.st_size) for each in stats)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.cert, self.key)
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cafile=self.client_ca)
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        if self.crl is not None:
            context.load_verify_locations(cafile=self.crl)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        return context

    def _on_hello(self, secured: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called by every handshake, also of a client that names no server."""
        self._refresh()
        secured.context = self._current["now"]

    def _refresh(self) -> None:
        with self._lock:
            try:
                stamp = self._look()
                if stamp == self._stamp[0]:
                    return
                self._current["now"] = self._load()
                self._stamp[0] = stamp
            except OSError as error:
                logger.error("event=tls_files_unusable error=%r", str(error))  # noqa: TRY400 - the old ones go on
                return
        logger.info("event=tls_files_reloaded")
