"""The hot swap under load: open loop, kept connections, not one failed request."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest

from tests.agent.world import wait_for

RATE = 200.0
CONNECTIONS = 8
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0.1, 0.2, 0.3, 0.4]}]}).encode()
HEAD = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(BODY)


class Client:
    """One kept connection; it opens another when the server says close, as any HTTP client does."""

    def __init__(self, port):
        self.port, self.reader, self.writer = port, None, None

    async def send(self):
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(HEAD + BODY)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        body = json.loads(await self.reader.readexactly(length))
        if "connection: close" in head:
            self.writer.close()
            self.writer = None
        status = int(head.split()[1])
        digest = head.split("edgekit-model-digest: ")[1].split("\r\n")[0] if status == 200 else ""
        assert status != 200 or digest == body["parameters"]["model_digest"]
        return status, digest, body.get("model_version")


async def load(port, stop, outcomes, failures):
    free = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(Client(port))
    loop = asyncio.get_running_loop()
    tasks, due = [], loop.time()

    async def one():
        client = await free.get()
        try:
            status, digest, version = await client.send()
            outcomes[status, version, digest] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            failures.append(repr(error))
            client.writer = None
        finally:
            free.put_nowait(client)

    while not stop.is_set():
        due += 1 / RATE
        await asyncio.sleep(max(0, due - loop.time()))
        tasks.append(asyncio.ensure_future(one()))
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("swaps", [2])
def test_no_request_fails_while_models_are_swapped(world, make_agent, swaps):
    world.publish("1.0", seed=1)
    agent = make_agent(drain_s=2.0).start()
    agent.wait_served("1.0")
    outcomes, failures = Counter(), []

    async def main():
        stop = asyncio.Event()
        running = asyncio.ensure_future(load(agent.port, stop, outcomes, failures))
        await asyncio.sleep(0.3)
        for number in range(2, 2 + swaps):
            await asyncio.to_thread(world.publish, f"{number}.0", seed=number)
            await asyncio.to_thread(agent.wait_served, f"{number}.0")
            await asyncio.to_thread(wait_for, lambda: len(agent.worker_pids()) == 1, what="the old worker's end")
        stop.set()
        await running

    asyncio.run(main())
    assert failures == []
    assert {status for status, _, _ in outcomes} == {200}
    by_version = {version: digest for _, version, digest in outcomes}
    assert len(by_version) == len(outcomes) == swaps + 1
    assert agent.status()["requests"] == sum(outcomes.values())
    assert agent.status()["errors"] == 0
