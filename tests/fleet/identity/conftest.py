from __future__ import annotations

import pytest

from tests.fleet.identity.identity_world import Api, Broker, Fleet


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path)
    yield made
    made.close()


@pytest.fixture
def api(fleet):
    made = Api(fleet)
    yield made
    made.close()


@pytest.fixture
def broker(fleet):
    made = Broker(fleet)
    try:
        yield made.start()
    finally:
        made.kill()
