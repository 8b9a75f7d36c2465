"""Every page in a real browser: accessible, quiet, light, readable on a telephone, and loading nothing from anywhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

AXE = Path(__file__).resolve().parents[1] / "vendor" / "axe.min.js"
MAX_BYTES = 120_000
PAGES = {
    "overview": "/",
    "devices": "/devices",
    "devices-filtered": "/devices?state=online&selector=site%3Dlab&sort=latency_p99&desc=1",
    "device": "/devices/bergen/cam-000",
    "device-in-trouble": "/devices/lab/cam-001",
    "models": "/models",
    "model": "/models/m",
    "drift": "/drift/m",
    "rollouts": "/rollouts",
    "rollout": "/rollouts/{rollout}",
    "alerts": "/alerts",
    "alert": "/alerts/{alert}",
    "registry": "/registry",
    "release": "/registry/m",
    "audit": "/audit",
    "events": "/events",
    "settings": "/settings",
    "api": "/api",
    "not-found": "/devices/nowhere/nobody",
}
WAYS = ((1280, "light"), (1280, "dark"), (390, "dark"), (390, "light"))
RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}}


def address(world, name):
    alert = world.services.alerts.open_alerts()[0].id
    return world.server.url + PAGES[name].format(rollout=world.rollout, alert=alert)


def violations(page):
    found = page.evaluate(f"axe.run(document, {json.dumps(RULES)}).then(r => r.violations)")
    return [(item["id"], [node["target"] for node in item["nodes"]][:4]) for item in found]


@pytest.mark.parametrize("name", PAGES)
def test_page_is_accessible_quiet_and_light(name, world, chromium, screenshots):
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", bypass_csp=False)
    page = context.new_page()
    problems, requests, weight = [], [], []
    page.on("console", lambda message: problems.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfinished", lambda request: weight.append(request.sizes()["responseBodySize"]))
    answer = page.goto(address(world, name))
    expected = 404 if name == "not-found" else 200
    assert answer.status == expected
    page.locator("#live").wait_for(state="attached")
    page.wait_for_timeout(400)
    page.evaluate(AXE.read_text())
    for width, scheme in WAYS:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(250)
        page.screenshot(path=screenshots / f"{name}-{width}-{scheme}.png", full_page=True)
        assert violations(page) == [], f"{name} {width} {scheme}"
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    if expected == 404:
        problems = [each for each in problems if "404" not in each]
    assert problems == []
    assert all(url.startswith((world.server.url + "/", "data:")) for url in requests), requests
    assert 0 < sum(weight) <= MAX_BYTES
    context.close()


def test_login_page_is_accessible(chromium, screenshots, tmp_path):
    from web_world import WebWorld

    world = WebWorld(tmp_path, is_empty=True)
    try:
        world.services.access.accounts.add("lee", role="admin", password="correct horse battery", actor="local", now_ms=1)
        context = chromium.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
        page = context.new_page()
        page.goto(world.serve() + "/devices?state=online")
        assert page.url.endswith("/login?next=/devices%3Fstate%3Donline")
        page.screenshot(path=screenshots / "login-390-dark.png")
        page.evaluate(AXE.read_text())
        assert violations(page) == []
        page.fill("#name", "lee")
        page.fill("#password", "wrong wrong wrong")
        page.click("button.primary")
        assert "do not fit" in page.locator("[role=alert]").inner_text()
        page.fill("#name", "lee")
        page.fill("#password", "correct horse battery")
        page.click("button.primary")
        assert page.url.endswith("/devices?state=online")
        page.goto(world.server.url + "/")
        assert page.locator("h1").inner_text() == "No device has reported yet"
        page.screenshot(path=screenshots / "empty-390-dark.png")
        page.click("text=Log out")
        assert page.url.endswith("/login")
        page.goto(world.server.url + "/audit")
        assert "/login" in page.url
        context.close()
    finally:
        world.close()
