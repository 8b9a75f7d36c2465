"""Pages that keep themselves current in a real browser, and what a person does on them."""

from __future__ import annotations

import re

import pytest
from fleet_world import wait_until
from web_world import WebWorld

PATIENCE_MS = 15_000


@pytest.fixture
def page(chromium, world):
    context = chromium.new_context(viewport={"width": 1280, "height": 700})
    context.set_default_timeout(PATIENCE_MS)
    yield context.new_page()
    context.close()


def test_new_figures_come_in_place_and_disturb_nothing(page, world):
    page.goto(world.server.url + "/devices/bergen/cam-004")
    page.locator("#live.is-live").wait_for()
    before = page.locator("text=/\\d+ stored/").inner_text()
    page.locator("#slots-title").evaluate("element => { element.marked = true; }")
    page.locator("#latency-histogram details summary").click()
    page.locator("a:has-text('all events')").focus()
    page.evaluate("window.scrollTo(0, 400)")
    world.beat(4)
    page.locator(f"text=/\\d+ stored/ >> text=/^(?!{re.escape(before[:12])})/").wait_for()
    assert page.locator("#slots-title").evaluate("element => element.marked === true")
    assert page.locator("#latency-histogram details").evaluate("element => element.open")
    assert page.evaluate("document.activeElement.textContent") == "all events"
    assert page.evaluate("window.scrollY") == 400


def test_half_written_reason_survives_a_change(page, world):
    page.goto(f"{world.server.url}/rollouts/{world.rollout}")
    page.locator("#live.is-live").wait_for()
    page.locator("summary:has-text('Roll back')").click()
    page.fill("#reason-rollback", "it is too")
    page.evaluate("document.querySelector('.waves').marked = 1; window.puts = 0")
    page.evaluate("document.addEventListener('edgekit-put', () => { window.puts += 1; })")
    world.beat(8)
    page.locator("html").evaluate("() => new Promise(done => document.addEventListener('edgekit-put', done, { once: true }))")
    assert page.input_value("#reason-rollback") == "it is too"
    assert page.evaluate("document.activeElement.id") == "reason-rollback"


def test_two_tabs_share_one_stream_and_the_second_takes_over(chromium, world):
    context = chromium.new_context()
    context.set_default_timeout(PATIENCE_MS)
    streams = []
    context.on("request", lambda request: streams.append(request.url) if "/live" in request.url else None)
    first, second = context.new_page(), context.new_page()
    first.goto(world.server.url + "/devices/bergen/cam-012")
    first.locator("#live.is-live").wait_for()
    second.goto(world.server.url + "/devices/bergen/cam-012")
    second.locator("#live.is-live").wait_for()
    put = "() => new Promise(done => document.addEventListener('edgekit-put', () => done(true), { once: true }))"
    both = [tab.evaluate_handle(f"() => ({{ done: ({put})() }})") for tab in (first, second)]
    world.beat(12)
    assert all(handle.evaluate("async it => await it.done") for handle in both)
    assert len(streams) == 1
    again = second.evaluate_handle(f"() => ({{ done: ({put})() }})")
    first.close()
    wait_until(lambda: second.evaluate("1") and len(streams) == 2)
    assert "after=" in streams[1]
    world.beat(12)
    assert again.evaluate("async it => await it.done")
    context.close()


def test_search_sort_and_page_are_in_the_address(page, world):
    page.goto(world.server.url + "/devices")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("cam-01")
    page.locator("h1:has-text('10')").wait_for()
    assert "search=cam-01" in page.url
    page.locator("th a:has-text('p99 ms')").click()
    page.locator("th[aria-sort=descending]:has-text('p99 ms')").wait_for()
    assert "sort=latency_p99" in page.url
    values = [float(text) for text in page.locator("td[data-label='p99 ms']").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    page.go_back()
    page.locator("th[aria-sort=ascending]:has-text('device')").wait_for()
    assert page.input_value("#search") == "cam-01"


def test_keys_lead_to_pages_and_can_be_switched_off(page, world):
    page.goto(world.server.url + "/")
    page.keyboard.press("g")
    page.keyboard.press("a")
    page.wait_for_url("**/alerts")
    page.keyboard.press("?")
    page.locator("dialog[open]").wait_for()
    page.locator("#keys-on").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("d")
    page.wait_for_timeout(200)
    assert page.url.endswith("/alerts")


def test_device_grid_names_and_opens_devices_by_keyboard(page, world):
    page.goto(world.server.url + "/devices")
    page.locator("#field canvas").focus()
    page.keyboard.press("ArrowRight")
    page.locator(".tip:has-text('bergen/cam-000: online')").wait_for()
    page.keyboard.press("ArrowRight")
    page.locator(".tip:has-text('bergen/cam-004')").wait_for()
    page.keyboard.press("Enter")
    page.wait_for_url("**/devices/bergen/cam-004")


def test_chart_reads_its_values_by_keyboard_and_can_be_saved(page, world, tmp_path):
    page.goto(world.server.url + "/drift/m")
    plot = page.locator("#effect .plot")
    plot.focus()
    page.keyboard.press("End")
    text = page.locator("#said").text_content()
    assert "effect" in text
    shown = page.locator("#effect .twin tbody tr").last.locator("td").get_attribute("data-v")
    assert f"{float(shown):.2g}"[:3] in text
    for kind, begin in (("svg", b"<svg"), ("png", b"\x89PNG")):
        with page.expect_download() as waited:
            page.locator(f"#effect [data-save={kind}]").click()
        waited.value.save_as(tmp_path / f"chart.{kind}")
        assert (tmp_path / f"chart.{kind}").read_bytes().startswith(begin)


def test_theme_is_kept(page, world):
    page.goto(world.server.url + "/")
    page.click("#theme")
    chosen = page.evaluate("document.documentElement.dataset.theme")
    page.goto(world.server.url + "/devices")
    assert page.evaluate("document.documentElement.dataset.theme") == chosen == "dark"


def test_pages_work_without_scripts(chromium, world):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(world.server.url + "/devices")
    page.fill("#search", "cam-01")
    page.click("button:has-text('Filter')")
    assert "search=cam-01" in page.url
    page.click("th a:has-text('p50')")
    assert page.locator("th[aria-sort]").inner_text().startswith("p50")
    context.close()


def test_people_decide_on_the_pages_and_the_log_says_so(chromium, tmp_path):
    world = WebWorld(tmp_path, devices=24, intervals=3)
    try:
        accounts = world.services.access.accounts
        for name, role in (("lee", "admin"), ("kim", "operator"), ("sam", "viewer")):
            accounts.add(name, role=role, password="correct horse battery", actor="local", now_ms=1)
        url = world.serve()
        context = chromium.new_context()
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()

        def log_in(name):
            page.goto(url + "/login")
            page.fill("#name", name)
            page.fill("#password", "correct horse battery")
            page.click("button.primary")

        log_in("sam")
        page.goto(f"{url}/rollouts/{world.rollout}")
        assert page.locator("summary:has-text('Roll back')").count() == 0
        page.click("text=Log out")
        log_in("kim")
        page.goto(f"{url}/rollouts/{world.rollout}")
        page.locator("summary:has-text('Resume')").click()
        page.fill("#reason-resume", "the cameras were being cleaned")
        page.click("button:has-text('Resume rollout')")
        page.locator(".tag:has-text('running')").wait_for()
        alert = world.services.alerts.open_alerts()[0].id
        page.goto(f"{url}/alerts/{alert}")
        page.locator("summary:has-text('Take it in hand')").click()
        page.fill("#ack-comment", "on my way")
        page.click("button:has-text('Acknowledge')")
        page.locator("text=kim has it in hand").wait_for()
        page.locator("summary:has-text('Silence')").click()
        page.fill("#silence-reason", "known until tomorrow")
        page.click("form[action='/silences'] button")
        page.wait_for_url("**/alerts")
        page.locator("text=known until tomorrow").wait_for()
        page.goto(f"{url}/audit?actor=kim")
        text = page.locator("table").inner_text()
        for words in ("rollout resumed", "the cameras were being cleaned", "silence made", "login succeeded"):
            assert words in text
        page.goto(f"{url}/settings")
        assert page.locator("#users-title").count() == 0
        page.locator("summary:has-text('Make a token')").click()
        page.fill("#token-name", "nightly export")
        page.click("button:has-text('Make it')")
        assert page.locator(".secret").inner_text().startswith("ekf_")
        context.close()
    finally:
        world.close()
