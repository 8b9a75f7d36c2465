"""A role key that never leaves its token: a real PKCS#11 token in software."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"]
MODULE = next((path for path in MODULES if Path(path).is_file()), "")
pytestmark = pytest.mark.skipif(
    not MODULE or shutil.which("softhsm2-util") is None, reason="softhsm2 is not installed, so there is no token to test with"
)
PIN = "1234"
MAKE_KEY = """
import sys, pkcs11
from pkcs11 import Attribute, KeyType, Mechanism
from pkcs11.util.ec import encode_named_curve_parameters
token = pkcs11.lib(sys.argv[1]).get_token(token_label="ceremony")
with token.open(user_pin=sys.argv[2], rw=True) as session:
    parameters = session.create_domain_parameters(
        KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
    )
    parameters.generate_keypair(mechanism=Mechanism.EC_KEY_PAIR_GEN, store=True, id=bytes([2]), label="root")
"""


@pytest.fixture
def environment(tmp_path):
    """A token with one P-256 key in slot 2, as a smart card has it."""
    (tmp_path / "tokens").mkdir()
    conf = tmp_path / "softhsm2.conf"
    conf.write_text(f"directories.tokendir = {tmp_path / 'tokens'}\nobjectstore.backend = file\n")
    found = os.environ | {"SOFTHSM2_CONF": str(conf), "PYKCS11LIB": MODULE, "EDGEKIT_HSM_PIN": PIN}
    init = ["softhsm2-util", "--init-token", "--free", "--label", "ceremony", "--pin", PIN, "--so-pin", PIN]
    subprocess.run(init, env=found, check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", MAKE_KEY, MODULE, PIN], env=found, check=True, capture_output=True)
    return found


def edgekit(*words, env):
    return subprocess.run(
        [sys.executable, "-m", "edgekit", *words], env=env, capture_output=True, text=True, check=False, timeout=60
    )


def test_root_key_on_a_token_signs_and_a_device_follows(environment, tmp_path):
    repo = str(tmp_path / "repo")
    made = edgekit(
        "trust", "init", repo, "--root-keys", "1", "--threshold", "1", "--root-key", "hsm:2?label=ceremony", env=environment
    )
    assert made.returncode == 0, made.stderr
    assert not list((tmp_path / "keys").glob("root*.pem"))
    rotated = edgekit("trust", "rotate", repo, "timestamp", "--old", "timestamp", "--new", "generate", env=environment)
    assert rotated.returncode == 0, rotated.stdout + rotated.stderr

    from datetime import UTC, datetime

    from edgekit.repository.server import RepositoryServer
    from edgekit.schema.state import Floors
    from edgekit.trust.repository_client import TrustedRepository

    root = (tmp_path / "repo" / "metadata" / "1.root.json").read_bytes()
    with RepositoryServer(tmp_path / "repo", "127.0.0.1", 0) as server:
        device = TrustedRepository(tmp_path / "cache", server.url, root=root, floors=Floors(), now=datetime.now(UTC))
        assert device.refresh().versions.root == 2


def test_token_without_its_pin_or_absent(environment, tmp_path):
    repo = str(tmp_path / "repo")
    words = ("trust", "init", repo, "--root-keys", "1", "--threshold", "1", "--root-key")
    without = edgekit(*words, "hsm:2?label=ceremony", env=environment | {"EDGEKIT_HSM_PIN": ""})
    assert without.returncode == 2
    assert "EDGEKIT_HSM_PIN" in without.stderr
    absent = edgekit(*words, "hsm:2?label=other", env=environment)
    assert absent.returncode == 2
    assert "cannot be used" in absent.stderr
    assert not (tmp_path / "repo" / "repository.json").exists()
