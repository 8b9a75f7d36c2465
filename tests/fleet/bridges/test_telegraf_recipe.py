"""The recipe for Telegraf, as far as it can be checked without Telegraf: it is TOML, and its paths meet a real message.

Telegraf itself is not run here. Its parser makes an element of each key of the JSON and asks by XPath; the same is done with
the standard library, whose XPath is a part of Telegraf's.
"""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest
from fleet_world import birth, window, windows

from edgekit.fleet.bridges.running import JsonBridge
from edgekit.fleet.bridges.telegraf import MAX_WAITING, WindowReader, encode_line
from edgekit.fleet.config import parse_broker
from edgekit.fleet.simulator.behaviour import METRICS, SimulatedDevice
from edgekit.fleet.simulator.options import SimulatorOptions
from edgekit.fleet.simulator.releases import ReleaseBook, invent_release
from edgekit.telemetry.codec import decode, encode

RECIPE = Path(__file__).resolve().parents[3] / "scripts" / "deploy" / "telegraf" / "telegraf.conf"
T0 = 1_790_000_000_000


@pytest.fixture
def source() -> dict:
    return tomllib.loads(RECIPE.read_text())["inputs"]["mqtt_consumer"][0]


def real_line() -> bytes:
    """A window of a simulated device, through birth, codec and bridge."""
    book = ReleaseBook([invent_release("kws@2.0.0", counter=1)])
    device = SimulatedDevice(SimulatorOptions(), 0, book, start_ms=T0, run="recipe")
    device.connected(T0)
    device.step(T0 + 60_000)
    reader, found = WindowReader(), []
    while (message := device.next_message(T0 + 60_000)) is not None:
        found += reader.take(device.site, device.name, decode(message.payload))
    return encode_line(found[0])


def as_tree(value, name: str = "root") -> ET.Element:
    element = ET.Element(name)
    if isinstance(value, dict):
        element.extend(as_tree(part, key) for key, part in value.items())
    else:
        element.text = str(value)
    return element


def test_paths_of_the_recipe_meet_a_real_message(source):
    line = real_line()
    tree, xpath = as_tree(msgspec.json.decode(line)), source["xpath"][0]
    paths = [xpath["timestamp"], *xpath["tags"].values(), *xpath["fields_int"].values()]
    for path in paths:
        assert re.fullmatch(r"/\w+", path)
        assert tree.find(f".{path}").text
    figures = {each.tag: float(each.text) for each in tree.findall(f".{xpath['field_selection']}")}
    assert set(figures) == {spec.name for spec in METRICS}
    assert all(map(math.isfinite, figures.values()))
    assert {each.tag for each in tree.findall(f".{xpath['tag_selection']}")} == {"hardware", "ring"}
    assert abs(int(tree.find(f".{xpath['timestamp']}").text) - T0) < 120_000
    assert xpath["timestamp_format"] == "unix_ms"


def test_names_can_be_elements_and_do_not_hide_each_other(source):
    found = msgspec.json.decode(real_line())
    for name in (*found, *found["figures"], *found["labels"]):
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name)
    assert not set(found["figures"]) & {*source["xpath"][0]["fields_int"], *source["xpath"][0]["tags"]}


def test_recipe_subscribes_to_what_the_bridge_publishes(source):
    address = parse_broker("mqtt://127.0.0.1")
    prefix = JsonBridge(address=address, target=address).prefix
    assert source["topics"] == [f"{prefix}/+/+"]
    assert (source["qos"], source["persistent_session"], bool(source["client_id"])) == (1, True, True)


def test_windows_of_another_schema_are_not_read_with_this_one():
    reader = WindowReader()
    reader.take("lab", "cam", birth())
    other = msgspec.structs.replace(windows(window(1)), schema=77)
    assert reader.take("lab", "cam", other) == []
    assert reader.skipped == 1
    assert len(reader.take("lab", "cam", windows(window(2)))) == 1


def test_windows_that_wait_for_a_birth_are_not_kept_without_end():
    reader = WindowReader()
    for seq in range(1, MAX_WAITING + 6):
        assert reader.take("lab", "cam", windows(window(seq))) == []
    assert reader.skipped == 5
    assert len(reader.take("lab", "cam", decode(encode(birth())))) == MAX_WAITING


def test_values_that_are_none_of_ours_give_a_line_without_figures():
    reader = WindowReader()
    reader.take("lab", "cam", birth())
    odd = msgspec.structs.replace(window(1), values=b"abc")
    (line,) = reader.take("lab", "cam", windows(odd))
    assert line.figures == {}
