"""Only this machine is loopback: names that begin like it are not."""

from __future__ import annotations

import pytest

from edgekit.loopback import is_loopback


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_own_address(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "10.0.0.1", "example", "127.0.0.1.example.org", "localhost.example.org"])
def test_other_address(host):
    assert not is_loopback(host)
