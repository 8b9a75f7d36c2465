"""The HTTP server over real sockets: framing, bounds, order, and the drain that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket

import pytest

from edgekit.agent.http import Answer, Limits, Request, Server


def serve(test, *, handler=None, limits=None):
    """Run a coroutine test(server, port) against a server."""

    def echo(request: Request) -> Answer:
        return Answer(status=200, body=request.method.encode() + b" " + request.path.encode() + b" " + request.body)

    async def main():
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = Server(handler or echo, limits or Limits())
        server.start(listener)
        try:
            await asyncio.wait_for(test(server, port), 20)
        finally:
            server.stop_accepting()
            if server._sweeper:
                server._sweeper.cancel()

    asyncio.run(main())


async def read_answer(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(lines[0].split()[1]), headers, body


async def exchange(port, data):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await read_answer(reader)
    rest = await reader.read(1) if answer[1].get("connection") == "close" else None
    writer.close()
    return answer, rest


def test_connection_kept_alive():
    async def test(_server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in range(3):
            writer.write(b"POST /a%d?x=1 HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi" % number)
            status, headers, body = await read_answer(reader)
            assert (status, body) == (200, b"POST /a%d hi" % number)
            assert "connection" not in headers
        writer.close()

    serve(test)


def test_pipelined_requests_answered_in_order_with_a_slow_one_first():
    async def slow(request):
        await asyncio.sleep(0.05)
        return Answer(status=200, body=request.path.encode())

    def handler(request):
        return slow(request) if request.path == "/0" else Answer(status=200, body=request.path.encode())

    async def test(_server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % number for number in range(50)))
        bodies = [(await read_answer(reader))[2] for _ in range(50)]
        assert bodies == [b"/%d" % number for number in range(50)]
        writer.close()

    serve(test, handler=handler)


def test_request_in_single_bytes():
    async def test(_server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for byte in b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc":
            writer.write(bytes([byte]))
            await writer.drain()
        assert (await read_answer(reader))[2] == b"POST /x abc"
        writer.close()

    serve(test)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 1\r\n\r\na", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 101\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n65\r\n" + b"x" * 101 + b"\r\n0\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"x" * 20_000 + b"\r\n\r\n", 431),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ],
)
def test_request_refused_and_connection_closed(request_bytes, status):
    async def test(_server, port):
        (found, headers, body), rest = await exchange(port, request_bytes)
        assert found == status
        assert headers["connection"] == "close"
        assert b'"error"' in body
        assert rest == b""

    serve(test, limits=Limits(max_body_bytes=100))


def test_upgrade_offer_ignored():
    async def test(_server, port):
        data = b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
        (status, headers, body), rest = await exchange(port, data)
        assert (status, headers["connection"], body, rest) == (200, "close", b"GET /x ", b"")

    serve(test)


def test_slow_sender_refused():
    async def test(_server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nab")
        assert (await read_answer(reader))[0] == 408
        writer.close()

    serve(test, limits=Limits(request_seconds=0.1))


def test_expect_continue_answered():
    async def test(_server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(b"hi")
        assert (await read_answer(reader))[2] == b"POST /x hi"
        writer.close()

    serve(test)


def test_handler_bug_is_500_and_connection_lives():
    def handler(request):
        if request.path == "/bug":
            raise RuntimeError("boom")
        return Answer(status=200, body=b"ok")

    async def test(_server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /bug HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await read_answer(reader))[0] == 500
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await read_answer(reader))[0] == 200
        writer.close()

    serve(test, handler=handler)


def test_http_1_0_closed_after_the_answer():
    async def test(_server, port):
        (status, headers, _), rest = await exchange(port, b"GET / HTTP/1.0\r\n\r\n")
        assert (status, headers["connection"], rest) == (200, "close", b"")

    serve(test)


def test_drain_answers_the_request_in_flight_and_says_close():
    async def slow(_request):
        await asyncio.sleep(0.1)
        return Answer(status=200, body=b"done")

    async def test(server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.03)
        drained = asyncio.ensure_future(server.drain(limit_seconds=5))
        status, headers, body = await read_answer(reader)
        assert (status, headers["connection"], body) == (200, "close", b"done")
        assert await drained
        writer.close()

    serve(test, handler=slow)


def test_drain_keeps_an_idle_connection_for_the_grace_period():
    async def test(server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /1 HTTP/1.1\r\nhost: x\r\n\r\n")
        await read_answer(reader)
        drained = asyncio.ensure_future(server.drain(limit_seconds=10))
        await asyncio.sleep(0.3)
        writer.write(b"GET /2 HTTP/1.1\r\nhost: x\r\n\r\n")
        status, headers, body = await read_answer(reader)
        assert (status, headers["connection"], body) == (200, "close", b"GET /2 ")
        assert await drained
        with contextlib.suppress(ConnectionError):
            writer.close()

    serve(test, limits=Limits(drain_seconds=5))


def test_drain_ends_silent_connections():
    async def test(server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /1 HTTP/1.1\r\nhost: x\r\n\r\n")
        await read_answer(reader)
        assert await server.drain(limit_seconds=10)
        assert await reader.read() == b""
        writer.close()

    serve(test, limits=Limits(drain_seconds=0.2))


def test_backlog_left_for_the_next_server():
    """A connection that the draining server never accepted is served by whoever accepts on the same socket next."""

    def tagged(tag):
        return lambda _request: Answer(status=200, body=tag)

    async def main():
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        old = Server(tagged(b"old"))
        old.start(listener.dup())
        (_, _, body), _ = await exchange(port, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert body == b"old"
        assert await old.drain(limit_seconds=10)
        waiting = asyncio.ensure_future(exchange(port, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
        await asyncio.sleep(0.1)
        new = Server(tagged(b"new"))
        new.start(listener)
        assert (await waiting)[0][2] == b"new"
        await new.drain(limit_seconds=5)

    asyncio.run(main())


def test_answer_to_head_has_no_body_and_the_connection_goes_on():
    async def test(_server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HEAD /a HTTP/1.1\r\nhost: x\r\n\r\nGET /b HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 8" in head
        assert (await read_answer(reader))[2] == b"GET /b "
        writer.close()

    serve(test)


def test_client_that_reads_nothing_is_not_answered_without_end():
    """Answers wait for their reader; one that never reads is cut off."""
    answered = []

    def large(request: Request) -> Answer:
        answered.append(request)
        return Answer(status=200, body=bytes(1 << 20))

    async def test(server, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setblocking(False)
            for _ in range(300):
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                await asyncio.sleep(0)
            await asyncio.sleep(0.1)
            assert 0 < len(answered) < 30
            for _ in range(200):
                await asyncio.sleep(0.02)
                if not server.connections:
                    break
            assert not server.connections

    serve(test, handler=large, limits=Limits(request_seconds=0.3))


def test_accepting_out_of_descriptors_waits_instead_of_spinning(monkeypatch):
    monkeypatch.setattr("edgekit.agent.http.ACCEPT_RETRY_S", 0.2)

    class Exhausted:
        def __init__(self, listener):
            self.listener, self.calls, self.is_exhausted = listener, 0, True

        def accept(self):
            self.calls += 1
            if self.is_exhausted:
                raise OSError(errno.EMFILE, "too many open files")
            return self.listener.accept()

        def __getattr__(self, name):
            return getattr(self.listener, name)

    async def test(server, port):
        (listener,) = server._listeners
        asyncio.get_running_loop().remove_reader(listener.fileno())
        server._listeners.clear()
        exhausted = Exhausted(listener)
        server.start(exhausted)
        asking = asyncio.ensure_future(exchange(port, b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n"))
        await asyncio.sleep(0.1)
        assert exhausted.calls == 1
        exhausted.is_exhausted = False
        assert (await asking)[0][2] == b"GET /x "

    serve(test)
