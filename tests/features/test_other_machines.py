"""Figures that are declared exact have the same bits with every instruction set of this machine's numpy."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekit.features.compute import compute
from edgekit.features.program import Program
from tests.features.declared import FIGURES, samples, vibration

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = {"AVX512": "AVX512F AVX512CD AVX512_SKX X86_V4", "AVX2": "AVX2 FMA3 X86_V3 AVX512F AVX512CD AVX512_SKX X86_V4"}


def fingerprint() -> str:
    """All exact figures, and windows with gaps of every kind."""
    columns = samples(3000)
    columns["ax"][np.random.default_rng(1).random(3000) < 0.1] = np.nan
    state = hashlib.sha256()
    for fill in ("none", "linear", "hold"):
        declared = vibration(fill=fill, aggregates=FIGURES)
        declared = msgspec.structs.replace(declared, inputs=declared.inputs[:1])
        assert Program(declared).is_exact
        state.update(compute(columns, declared).inputs["x"].tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("without", WITHOUT)
def test_bits_do_not_depend_on_the_instruction_set(without):
    code = "from tests.features.test_other_machines import fingerprint; print(fingerprint())"
    environment = os.environ | {"NPY_DISABLE_CPU_FEATURES": WITHOUT[without], "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    if "NPY_DISABLE_CPU_FEATURES" in done.stderr and done.returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == fingerprint()


def test_spectra_and_logarithms_promise_less():
    assert not Program(vibration(aggregates=("energy(0, 10)",))).is_exact
