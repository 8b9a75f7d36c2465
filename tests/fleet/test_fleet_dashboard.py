"""The pages: what they show, what they must not load, and that a real browser is content with them."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from html.parser import HTMLParser

import msgspec
import pytest
import uvicorn
from fastapi.testclient import TestClient
from fleet_world import birth, death, event, free_port, heartbeat, reported, wait_until, window, windows

from edgekit.fleet import live
from edgekit.fleet.dashboard import ago, format_number
from edgekit.fleet.drawing import histogram, sparkline
from edgekit.fleet.server import make_app
from edgekit.fleet.store import Store
from edgekit.fleet.writing import Fault, Received
from edgekit.schema.message import ModelWindow

HOSTILE = '"><script>alert(1)</script>'
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def fill(store, device="pi-1", **fields):
    now = now_ms()
    messages = (
        birth(time_ms=now, labels={"room": HOSTILE}),
        reported(time_ms=now, refused=("sha256:" + "0" * 64,), last_error=HOSTILE, last_error_code="selftest.mismatch"),
        windows(window(3, now - 20_000), window(4, now - 10_000, p50=2.5)),
        event(5, "install_refused", time_ms=now, version="3.0.0", detail=HOSTILE, code="selftest.mismatch"),
        heartbeat(7),
    )
    store.apply([Received(site="lab", device=device, message=m, received_ms=now) for m in messages])


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "fleet.db"))
    yield store
    store.close()


@pytest.fixture
def client(store):
    return TestClient(make_app(store, None), base_url="http://127.0.0.1")


class Page(HTMLParser):
    """Tags, and what a strict policy forbids."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.references, self.inline = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [value for name, value in attrs if name in {"src", "href"} and value]
        self.inline += [name for name in attributes if name == "style" or name.startswith("on")]
        if tag == "script" and "src" not in attributes:
            self.inline.append("script")


@pytest.mark.parametrize("path", ["/", "/devices/lab/pi-1", "/events", "/?search=pi&state=online", "/api"])
def test_page_loads_nothing_foreign_and_has_no_inline_code(client, store, path):
    fill(store)
    answer = client.get(path)
    page = Page(answer.text)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert page.inline == []
    assert all(reference.startswith(("/", "#")) and not reference.startswith("//") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert HOSTILE not in answer.text


def test_static_files_are_there_and_cached_by_content(client, store):
    fill(store)
    references = {
        r for path in ("/", "/devices/lab/pi-1") for r in Page(client.get(path).text).references if r.startswith("/static/")
    }
    assert len(references) >= 6
    for reference in references:
        answer = client.get(reference)
        assert answer.status_code == 200, reference
        assert "immutable" in answer.headers["cache-control"]
        assert not re.search(r"https?://(?!github\.com/leeoniya|www\.w3\.org)", answer.text), reference
    assert client.get("/static/0/../../store.py").status_code == 404
    assert client.get("/static/0/%2e%2e/store.py").status_code == 404


def test_overview_says_what_needs_attention_once_per_release(client, store):
    for name in ("pi-1", "pi-2", "pi-3"):
        fill(store, name)
    store.apply([Received(site="lab", device="pi-3", message=death(), received_ms=now_ms())])
    text = client.get("/").text
    assert "3 devices" in text
    assert text.count("refused fashion@3.0.0") == 1
    assert "lost its connection" in text
    assert text.index("lost its connection") < text.index("refused fashion@3.0.0")


def test_empty_fleet_says_what_to_do(client):
    assert "edgekit agent run" in client.get("/").text
    assert "No event" in client.get("/events").text
    assert client.get("/devices/lab/nobody").status_code == 404


def test_fragments_have_the_parts_that_the_page_replaces(client, store):
    fill(store)
    for page, fragment in (("/", "/fragments/overview"), ("/devices/lab/pi-1", "/fragments/devices/lab/pi-1")):
        parts = re.findall(r'data-part="(\w+)"', client.get(page).text)
        assert parts
        assert parts == re.findall(r'data-part="(\w+)"', client.get(fragment).text)


def test_events_of_one_kind(client, store):
    fill(store)
    assert "install refused</b>" in client.get("/events?kind=install_refused").text
    assert "install refused</b>" not in client.get("/events?kind=rolled_back").text
    assert client.get("/api/v1/events?kind=rolled_back").json()["events"] == []


def test_api_page_names_every_route(client):
    text = client.get("/api").text
    for path in client.get("/api/v1/openapi.json").json()["paths"]:
        assert path in text


def test_refused_message_is_shown_on_its_devices_page(client, store):
    fill(store)
    assert "not accepted" not in client.get("/devices/lab/pi-1").text
    for _ in range(2):
        store.apply([], [Fault(site="lab", device="pi-1", error=f"w: {HOSTILE}", received_ms=now_ms())])
    text = client.get("/devices/lab/pi-1").text
    assert "2 not accepted" in text
    assert HOSTILE not in text


def test_tiles_count_refusals_and_outdated(client, store):
    fill(store)
    now = now_ms()
    for message in (birth(time_ms=now), reported(time_ms=now, version="2.0.0", counter=2)):
        store.apply([Received(site="lab", device="pi-2", message=message, received_ms=now)])
    tiles = re.findall(r'class="figure[^"]*">([^<]*)</span><span[^>]*>([^<]*)<', client.get("/").text)
    assert {label: figure for figure, label in tiles if label in {"✕ refused installs", "outdated"}} == {
        "✕ refused installs": "1",
        "outdated": "1",
    }


def test_device_page_shows_gaps_and_refusal(client, store):
    fill(store)
    text = client.get("/devices/lab/pi-1").text
    assert "5 stored" in text
    assert "2 missing" in text
    assert "selftest.mismatch" in text
    assert "<rect" in text


def test_device_page_shows_labels_merged_windows_and_told_losses(client, store):
    now = now_ms()
    fill(store)
    model = ModelWindow(model_digest="ab" * 6, requests=200, samples=200, labelled=50, right=45)
    whole = msgspec.structs.replace(window(20, now - 5000), merged=(8, 20), models=(model,))
    dropped = event(21, "messages_dropped", time_ms=now, fields={"boot": 7, "ranges": "6-7"})
    store.apply([Received(site="lab", device="pi-1", message=m, received_ms=now) for m in (windows(whole), dropped)])
    text = " ".join(client.get("/devices/lab/pi-1").text.split())
    assert "45 of 50 labelled answers of the last day right" in text
    assert "25.0 % of 200 labelled" in text
    assert "13 as part of a merged window" in text
    assert "2 given up by the device" in text
    assert "0 missing" in text


def without_stream(app):
    """The application with an event stream that ends at once, so that a browser can come to rest."""

    async def wrapped(scope, receive, send):
        if scope["type"] == "http" and scope["path"] == "/live":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await app(scope, receive, send)

    return wrapped


@pytest.fixture
def serve(store):
    servers = []

    def start(app):
        config = uvicorn.Config(app, port=free_port(), log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        wait_until(lambda: server.started)
        return f"http://127.0.0.1:{config.port}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def test_change_is_pushed(serve, store):
    import http.client

    served = serve(make_app(store, None))
    fill(store)
    connection = http.client.HTTPConnection(served.removeprefix("http://"), timeout=10)
    connection.request("GET", "/live", headers={"Last-Event-ID": "0"})
    stream = connection.getresponse()
    assert stream.headers["content-type"].startswith("text/event-stream")
    lines = [stream.readline().decode().strip() for _ in range(5)]
    assert 'data: ["lab/pi-1"]' in lines
    fill(store, "pi-2")
    lines = [stream.readline().decode().strip() for _ in range(4)]
    assert 'data: ["lab/pi-2"]' in lines
    connection.close()


@pytest.mark.parametrize(
    ("path", "wanted"),
    [("/", "lab/pi-1"), ("/devices/lab/pi-1", "u-wrap"), ("/events", "install refused"), ("/api", "openapi.json")],
)
def test_browser_is_content(serve, store, tmp_path, path, wanted):
    """A real Chromium: the page is there, its charts are drawn, and its console is silent."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    fill(store)
    command = [
        *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(
            f"--user-data-dir={tmp_path}",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            "--window-size=1280,1000",
            "--dump-dom",
        ),
        serve(without_stream(make_app(store, None))) + path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert wanted in done.stdout, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert console == []


@pytest.mark.parametrize(("last_id", "stamp"), [("3", 3), ("", 9), ("10", 9), ("²", 9), ("-1", 9), ("9" * 5000, 9)])
def test_last_event_id_is_read_or_passed_over(last_id, stamp):
    assert live._read_stamp(last_id, 9) == stamp


def test_numbers_read_well():
    assert format_number(None) == "\u2013"
    assert format_number(1234.5, 1) == "1\u202f234.5"
    assert ago(0, 61_000) == "1\u202fmin ago"
    assert ago(100, 0) == "0\u202fs ago"


def test_small_pictures():
    assert sparkline([1.0]) == ""
    assert sparkline([1.0, None, 2.0]).count(",") >= 2
    assert histogram([]) == ""
    assert histogram([(1.0, 2.0, 5), (8.0, 16.0, 1)]).count("<rect") == 4
