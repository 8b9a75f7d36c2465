"""The pages as the server gives them: what they show, what they must not load. In a browser: the folder ``web``."""

from __future__ import annotations

import re
import threading
import time
from html.parser import HTMLParser

import msgspec
import pytest
import uvicorn
from fastapi.testclient import TestClient
from fleet_world import birth, death, event, free_port, heartbeat, reported, wait_until, window, windows

from edgekit.fleet.access.service import Access
from edgekit.fleet.audit import record
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.jobs import Jobs
from edgekit.fleet.server import make_app
from edgekit.fleet.services import Services
from edgekit.fleet.store import Store
from edgekit.fleet.web.drawing import interval, parts, sparkline
from edgekit.fleet.web.live import Mark, Pulse
from edgekit.fleet.web.rendering import ago, format_bytes, format_number, format_share, format_span
from edgekit.fleet.writing import Fault, Received
from edgekit.schema.message import ModelWindow

HOSTILE = '"><script>alert(1)</script>'


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


@pytest.mark.parametrize(
    "path", ["/", "/devices", "/devices/lab/pi-1", "/events", "/devices?search=pi&state=online", "/models/fashion", "/api"]
)
def test_page_loads_nothing_foreign_and_has_no_inline_code(client, store, path):
    fill(store)
    answer = client.get(path)
    page = Page(answer.text)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert page.inline == []
    assert all(reference.startswith(("/", "#", "?")) and not reference.startswith("//") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert HOSTILE not in answer.text


def test_static_files_are_there_and_cached_by_content(client, store):
    fill(store)
    references = {
        r for path in ("/", "/devices/lab/pi-1") for r in Page(client.get(path).text).references if r.startswith("/static/")
    }
    assert len(references) >= 5
    for reference in references:
        answer = client.get(reference)
        assert answer.status_code == 200, reference
        assert "immutable" in answer.headers["cache-control"]
        assert not re.search(r"https?://(?!www\.w3\.org)", answer.text), reference
    assert client.get("/static/0/../../store.py").status_code == 404
    assert client.get("/static/0/%2e%2e/store.py").status_code == 404


def test_overview_says_what_needs_attention_once_per_release(client, store):
    for name in ("pi-1", "pi-2", "pi-3"):
        fill(store, name)
    store.apply([Received(site="lab", device="pi-3", message=death(), received_ms=now_ms())])
    text = client.get("/").text
    assert "3 devices" in text
    assert text.count("refused fashion@3.0.0</b>") == 1
    assert "lost its connection" in text
    assert text.index("lost its connection") < text.index("refused fashion@3.0.0")


def test_empty_fleet_says_what_to_do(client):
    assert "edgekit agent run" in client.get("/").text
    assert "No event" in client.get("/events").text
    assert client.get("/devices/lab/nobody").status_code == 404


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
    assert "2 messages not accepted" in text
    assert HOSTILE not in text


def test_figures_count_refusals_and_outdated(client, store):
    fill(store)
    now = now_ms()
    for message in (birth(time_ms=now), reported(time_ms=now, version="2.0.0", counter=2)):
        store.apply([Received(site="lab", device="pi-2", message=message, received_ms=now)])
    figures = {
        label: figure
        for figure, label in re.findall(
            r'class="n[^"]*"[^>]*>([^<]*)</span><span class="l"[^>]*>([^<]*)<', client.get("/").text
        )
    }
    assert (figures["refused installs"], figures["outdated"], figures["● online"]) == ("1", "1", "2")


def test_device_page_shows_gaps_and_refusal(client, store):
    fill(store)
    text = client.get("/devices/lab/pi-1").text
    assert "5 stored" in text
    assert "2 missing" in text
    assert "selftest.mismatch" in text
    assert 'data-kind="bars"' in text


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
    connection.request("GET", "/live", headers={"Last-Event-ID": "0-0-0-0"})
    stream = connection.getresponse()
    assert stream.headers["content-type"].startswith("text/event-stream")
    lines = [stream.readline().decode().strip() for _ in range(5)]
    assert 'data: {"devices":["lab/pi-1"],"topics":[]}' in lines
    fill(store, "pi-2")
    lines = [stream.readline().decode().strip() for _ in range(4)]
    assert 'data: {"devices":["lab/pi-2"],"topics":[]}' in lines
    with store.write() as change:
        record(change, actor="operator", action="rollout.halted", subject="rollout:1", now_ms=1)
    lines = [stream.readline().decode().strip() for _ in range(4)]
    assert 'data: {"devices":[],"topics":["audit"]}' in lines
    connection.close()


def test_change_by_another_server_is_pushed_without_names(serve, store):
    import http.client

    services = Services(config=FleetConfig(group="west"), store=store, jobs=Jobs(store, owner="a"))
    services.access = Access(store)
    served = serve(make_app(store, None, services=services))
    connection = http.client.HTTPConnection(served.removeprefix("http://"), timeout=10)
    connection.request("GET", "/live")
    stream = connection.getresponse()
    assert stream.readline().startswith(b"retry")
    stream.readline()
    other = Store(str(store.engine.url))
    fill(other)
    other.close()
    lines = [stream.readline().decode().strip() for _ in range(4)]
    assert 'data: {"devices":"all","topics":[]}' in lines
    connection.close()


@pytest.mark.parametrize(
    ("last_id", "stamp"),
    [("3-1-2-0", 3), ("", 9), ("10-1-2-0", 9), ("3", 9), ("3-1-2", 9), ("²-1-2-0", 9), ("-1-1-2-0", 9), ("9" * 5000, 9)],
)
def test_last_event_id_is_read_or_passed_over(last_id, stamp):
    newest = Mark(9, (1, 2, 3))
    found = Mark.parse(last_id, newest)
    assert found.stamp == stamp
    assert found == newest or str(found) == last_id or last_id.startswith("10")


def test_numbers_read_well():
    assert format_number(None) == "\u2013"
    assert format_number(1234.5, 1) == "1\u202f234.5"
    assert ago(0, 61_000) == "1\u202fmin ago"
    assert ago(100, 0) == "0\u202fs ago"

    assert (format_share(0.0), format_share(0.0004), format_share(-0.0001), format_share(0.5)) == (
        "0.0\u202f%",
        "<\u202f0.1\u202f%",
        "0.0\u202f%",
        "50.0\u202f%",
    )
    assert (format_bytes(12), format_bytes(1_234_567), format_bytes(None)) == ("12\u202fB", "1.2\u202fMB", "\u2013")
    assert (format_span(250), format_span(90_000), format_span(7_200_000)) == ("250\u202fms", "1.5\u202fmin", "2\u202fh")


def test_small_pictures():
    assert sparkline([1.0]) == ""
    assert sparkline([1.0, None, 2.0]).count(",") >= 2
    widths = [float(width) for width in re.findall(r'width="([\d.]+)"', parts([(9998, "good"), (1, "bad"), (0, "warn")]))]
    assert len(widths) == 2
    assert widths[1] >= 0.5, "one of ten thousand can be seen"
    assert sum(widths) <= 100.02
    assert parts([]).count("<rect") == 0
    assert parts([(0, "good")], total=4).count("<rect") == 0
    assert parts([(1, "good")], total=4).count('width="25.00"') == 1


def test_interval_is_drawn_around_zero():
    assert interval(None, None, None, margin=0.02) == ""
    text = interval(-0.01, 0.02, 0.05, margin=0.02)
    places = [float(value) for value in re.findall(r' x="([\d.]+)"', text)]
    band, zero, line, dot = places
    assert band < line < zero < dot
    assert all(0 <= place <= 100 for place in places)


def test_filter_sort_and_pages_of_the_list(client, store):
    for number in range(60):
        fill(store, f"pi-{number:02}")
    first = client.get("/devices?sort=last_seen&desc=1").text
    assert 'aria-sort="descending"' in first
    assert first.count('<tr data-key="lab/pi-') == 50
    following = re.search(r'href="([^"]*after=[^"]*)"', first)[1].replace("&amp;", "&")
    assert client.get(following).text.count('<tr data-key="lab/pi-') == 10
    assert client.get("/devices?selector=arch%3Daarch64,device%3Dpi-0*").text.count('<tr data-key="lab/pi-') == 10
    assert client.get("/devices?search=pi-59").text.count('<tr data-key="lab/pi-') == 1


@pytest.mark.parametrize(
    ("query", "says"),
    [("selector=colour%3Dred", "colour: no such key"), ("selector=site", "no condition"), ("after=x", "cursor")],
)
def test_query_that_cannot_be_is_explained_on_the_page(client, store, query, says):
    fill(store)
    answer = client.get(f"/devices?{query}", headers={"Accept": "text/html"})
    assert answer.status_code == 400
    assert says in answer.text
    assert "<nav" in answer.text


@pytest.mark.parametrize(
    "path", ["/devices?state=asleep", "/devices?sort=colour", "/events?before=x", "/models/nobody", "/rollouts/1"]
)
def test_wrong_address_is_a_page_for_people_and_json_for_programs(client, path):
    page = client.get(path, headers={"Accept": "text/html"})
    assert page.status_code in {400, 404}
    assert "<h1>" in page.text
    assert "content-security-policy" in page.headers
    assert client.get(path).headers["content-type"] == "application/json"


def test_devices_as_csv_disarm_formulas(client, store):
    fill(store)
    text = client.get("/devices.csv?search=pi").text
    assert text.splitlines()[0].startswith("site,device,state")
    assert "lab,pi-1,online" in text
    assert not re.search(r"(?m)(^|,)[=+@]", text)


def test_grid_is_a_letter_a_device(client, store):
    for name in ("pi-1", "pi-2", "pi-3"):
        fill(store, name)
    store.apply([Received(site="lab", device="pi-2", message=death(), received_ms=now_ms())])
    grid = client.get("/grid").json()
    assert grid["states"] == "131"
    assert grid["words"]["3"] == "offline"
    assert client.get("/grid/names?first=1&count=1").json() == ["lab/pi-2"]
    assert client.get("/grid?state=offline").json()["states"] == "3"
    assert set(client.get("/grid?color=release").json()["words"].values()) >= {"fashion@1.0.0"}
    assert len(client.get("/grid?color=latency").json()["states"]) == 3


def test_pages_of_every_database(database_url):
    store = Store(database_url)
    for name in ("pi-1", "pi-2"):
        fill(store, name)
    client = TestClient(make_app(store, None), base_url="http://127.0.0.1")
    for path in ("/", "/devices?sort=release&desc=1", "/devices/lab/pi-1", "/events", "/models", "/audit", "/rollouts"):
        assert client.get(path).status_code == 200, path
    for color, wanted in (("state", "11"), ("release", "aa"), ("latency", "11")):
        assert client.get(f"/grid?color={color}").json()["states"] == wanted
    assert Pulse(store, is_shared=True).now().topics[:3] == (0, 0, 0)
    store.close()


def test_pages_travel_compressed(client, store):
    fill(store)
    for path in ("/", "/devices", "/static/0/app.css"):
        assert client.get(path, headers={"Accept-Encoding": "gzip"}).headers["content-encoding"] == "gzip", path
        assert "content-encoding" not in client.get(path, headers={"Accept-Encoding": "identity"}).headers
