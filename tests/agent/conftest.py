"""Fixtures of the agent's tests; what they are made of is in world.py."""

from __future__ import annotations

import pytest

from tests.agent.world import Agent, World, build_manifest


@pytest.fixture
def make_manifest():
    return build_manifest


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def make_agent(tmp_path, world):
    agents = []

    def make(**settings):
        agent = Agent(tmp_path, **{"repository": world.url, "root": str(world.root)} | settings)
        agents.append(agent)
        return agent

    yield make
    for agent in agents:
        agent.stop()
