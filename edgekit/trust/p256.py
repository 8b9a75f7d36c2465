"""ECDSA on P-256 (FIPS 186-5, SEC 1) in plain Python: a device makes its key and its signatures with nothing installed.

The nonce is derived from key and message (RFC 6979), so that a signature never depends on the random numbers of a device that
has just booted. The ladder does the same steps for every bit and starts from random projective coordinates; Python's integers
still take a time that depends on their values, so this is for what a device does a few times a month and in a request of its
own making, not for a server that signs what strangers choose. TLS handshakes are OpenSSL's work, with the same key.

    >>> key = PrivateKey.generate()
    >>> PrivateKey.from_pem(key.to_pem()) == key
    True
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from edgekit.errors import ArtifactError
from edgekit.trust import der

_P = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
_BYTES = 32
_EC_PUBLIC_KEY = der.oid("1.2.840.10045.2.1")
_CURVE = der.oid("1.2.840.10045.3.1.7")
KEY_LABEL = "PRIVATE KEY"

_Point = tuple[int, int, int]
"""Jacobian: x/z², y/z³; z = 0 is the point at infinity."""


def _double(point: _Point) -> _Point:
    x, y, z = point
    delta, gamma = z * z % _P, y * y % _P
    beta = x * gamma % _P
    alpha = 3 * (x - delta) * (x + delta) % _P
    out_x = (alpha * alpha - 8 * beta) % _P
    out_z = ((y + z) * (y + z) - gamma - delta) % _P
    return out_x, (alpha * (4 * beta - out_x) - 8 * gamma * gamma) % _P, out_z


def _add(left: _Point, right: _Point) -> _Point:
    if not left[2]:
        return right
    if not right[2]:
        return left
    z1, z2 = left[2] * left[2] % _P, right[2] * right[2] % _P
    u1, u2 = left[0] * z2 % _P, right[0] * z1 % _P
    s1, s2 = left[1] * right[2] * z2 % _P, right[1] * left[2] * z1 % _P
    h, r = (u2 - u1) % _P, (s2 - s1) % _P
    if not h:
        return (1, 1, 0) if r else _double(left)
    h2 = h * h % _P
    h3, v = h * h2 % _P, u1 * h2 % _P
    x = (r * r - h3 - 2 * v) % _P
    return x, (r * (v - x) - s1 * h3) % _P, h * left[2] * right[2] % _P


def _multiply(factor: int, point: tuple[int, int]) -> _Point:
    """Montgomery's ladder over as many bits as every factor has."""
    z = secrets.randbelow(_P - 1) + 1
    z2 = z * z % _P
    low: _Point = (1, 1, 0)
    high: _Point = (point[0] * z2 % _P, point[1] * z2 * z % _P, z)
    for bit in range(_N.bit_length() - 1, -1, -1):
        if factor >> bit & 1:
            low, high = _add(low, high), _double(high)
        else:
            low, high = _double(low), _add(low, high)
    return low


def _affine(point: _Point) -> tuple[int, int]:
    inverse = pow(point[2], -1, _P)
    square = inverse * inverse % _P
    return point[0] * square % _P, point[1] * square * inverse % _P


@dataclass(frozen=True)
class PrivateKey:
    """A key; ``secret`` never leaves the process but in :meth:`to_pem`."""

    secret: int

    def __repr__(self) -> str:
        return "PrivateKey(...)"

    @classmethod
    def generate(cls) -> PrivateKey:
        """A new one, of the system's random numbers."""
        return cls(secrets.randbelow(_N - 1) + 1)

    @property
    def public(self) -> tuple[int, int]:
        """Its point."""
        return _affine(_multiply(self.secret, _G))

    def sign(self, message: bytes) -> bytes:
        """ECDSA with SHA-256, DER."""
        digest = int.from_bytes(hashlib.sha256(message).digest(), "big")
        for nonce in _nonces(self.secret, digest):
            r = _affine(_multiply(nonce, _G))[0] % _N
            blind = secrets.randbelow(_N - 1) + 1
            s = pow(nonce * blind, -1, _N) * (blind * digest + blind * r % _N * self.secret) % _N
            if r and s:
                return der.sequence(der.integer(r), der.integer(s))
        raise AssertionError("unreachable: the nonces do not end")

    def to_pem(self) -> str:
        """PKCS#8."""
        inner = der.sequence(
            der.integer(1),
            der.octets(self.secret.to_bytes(_BYTES, "big")),
            der.element(0xA1, der.bits(_encode_point(self.public))),
        )
        info = der.sequence(der.integer(0), der.sequence(_EC_PUBLIC_KEY, _CURVE), der.octets(inner))
        return der.to_pem(info, KEY_LABEL)

    @classmethod
    def from_pem(cls, text: str | bytes) -> PrivateKey:
        """The key of a PKCS#8 file.

        Raises:
            ArtifactError: ``certificate.malformed``.
        """
        try:
            (info,) = der.from_pem(text, KEY_LABEL)
            _version, algorithm, wrapped = der.read_all(info)[0].children()[:3]
            secret = int.from_bytes(der.read_all(wrapped.content)[0].children()[1].content, "big")
        except (ValueError, IndexError) as error:
            raise ArtifactError("certificate.malformed", "this is no private key in PKCS#8.") from error
        if algorithm.content != _EC_PUBLIC_KEY + _CURVE or not 0 < secret < _N:
            raise ArtifactError("certificate.malformed", "this private key is none of P-256.")
        return cls(secret)


def _nonces(secret: int, digest: int) -> Iterator[int]:
    """RFC 6979, section 3.2, with HMAC-SHA-256."""
    seed = secret.to_bytes(_BYTES, "big") + (digest % _N).to_bytes(_BYTES, "big")
    value, key = b"\1" * 32, b"\0" * 32
    for separator in (b"\0", b"\1"):
        key = hmac.digest(key, value + separator + seed, "sha256")
        value = hmac.digest(key, value, "sha256")
    while True:
        value = hmac.digest(key, value, "sha256")
        number = int.from_bytes(value, "big")
        if 0 < number < _N:
            yield number
        key = hmac.digest(key, value + b"\0", "sha256")
        value = hmac.digest(key, value, "sha256")


def _encode_point(point: tuple[int, int]) -> bytes:
    return b"\4" + point[0].to_bytes(_BYTES, "big") + point[1].to_bytes(_BYTES, "big")


def public_key_info(point: tuple[int, int]) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    return der.sequence(der.sequence(_EC_PUBLIC_KEY, _CURVE), der.bits(_encode_point(point)))
