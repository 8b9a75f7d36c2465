"""What every test may use, and the rule on skips: they are counted, printed, and fail the run under EDGEKIT_NO_SKIPS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    return ROOT / "sample_models" / "fashion-mnist"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped and os.environ.get("EDGEKIT_NO_SKIPS"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and os.environ.get("EDGEKIT_NO_SKIPS"):
        terminalreporter.write_line(f"EDGEKIT_NO_SKIPS is set and {len(skipped)} test(s) were skipped: failing", red=True)
