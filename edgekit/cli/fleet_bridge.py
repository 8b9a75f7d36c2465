"""``edgekit fleet bridge``: tell other systems what the fleet server knows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import typer

from edgekit.cli.console import note
from edgekit.cli.fleet_http import DEFAULT_URL, get_json

if TYPE_CHECKING:
    from edgekit.fleet.bridges.running import Fleet
    from edgekit.fleet.config import BrokerAddress

app = typer.Typer(
    help="Tell other systems what the fleet knows: Sparkplug B, Home Assistant, JSON for Telegraf.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
TARGET = typer.Option(..., "--target-broker", metavar="URL", help="The broker to tell: mqtt(s)://host[:port].")
URL = typer.Option(DEFAULT_URL, "--url", help="The fleet server to ask.")
EVERY = typer.Option("5s", "--every", help="How often it is asked.")
CA = typer.Option("", "--ca", metavar="FILE", help="Certificates to trust for mqtts.")
CERT = typer.Option("", "--cert", metavar="FILE", help="This bridge's certificate for the broker.")
KEY = typer.Option("", "--cert-key", metavar="FILE", help="Its key.")
INSECURE = typer.Option(False, "--allow-insecure", help="Accept a broker without TLS off loopback.")


def _address(url: str, ca: str, cert: str, key: str, insecure: bool) -> BrokerAddress:
    from edgekit.fleet.config import parse_broker

    return parse_broker(url, ca_file=ca, cert_file=cert, key_file=key, is_plain_allowed=insecure)


def _fleet(url: str, every: str) -> Fleet:
    from edgekit.fleet.bridges.running import Fleet
    from edgekit.fleet.simulator.options import parse_duration

    get_json(url, "/api/v1/health")  # a wrong address is told at once
    return Fleet(fetch=lambda path: get_json(url, path), every_s=max(0.1, parse_duration(every, "--every")))


def _begin(text: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s level=%(levelname)s logger=%(name)s %(message)s")
    note(text)
    note("Ctrl-C ends it.", "dim")


@app.command()
def sparkplug(
    group: str = typer.Option(..., "--group-id", help="The Sparkplug group; each site is an edge node of it."),
    target: str = TARGET,
    primary_host: str = typer.Option("", "--primary-host", metavar="ID", help="Publish only while this host is online."),
    url: str = URL,
    every: str = EVERY,
    ca: str = CA,
    cert: str = CERT,
    key: str = KEY,
    insecure: bool = INSECURE,
) -> None:
    """Publish the fleet as Sparkplug B 3.0: one edge node a site, its devices as Sparkplug devices."""
    from edgekit.fleet.bridges.running import SparkplugBridge, run_bridge
    from edgekit.fleet.bridges.sparkplug import check_id

    check_id(group, "--group-id")
    if primary_host:
        check_id(primary_host, "--primary-host")
    address = _address(target, ca, cert, key, insecure)
    bridge = SparkplugBridge(fleet=_fleet(url, every), address=address, group=group, primary_host=primary_host)
    _begin(f"spBv1.0/{group} at {address}")
    run_bridge(bridge)


@app.command("home-assistant")
def home_assistant(
    target: str = TARGET,
    prefix: str = typer.Option("homeassistant", "--discovery-prefix", help="As Home Assistant is configured."),
    topic: str = typer.Option("edgekit-ha", "--topic", help="States are published below it."),
    url: str = URL,
    every: str = EVERY,
    ca: str = CA,
    cert: str = CERT,
    key: str = KEY,
    insecure: bool = INSECURE,
) -> None:
    """Let Home Assistant discover every device of the fleet over MQTT."""
    from edgekit.fleet.bridges.homeassistant import HomeAssistant
    from edgekit.fleet.bridges.running import HomeAssistantBridge, run_bridge

    assistant = HomeAssistant(prefix=prefix, topic=topic, dashboard=url)
    address = _address(target, ca, cert, key, insecure)
    bridge = HomeAssistantBridge(fleet=_fleet(url, every), address=address, assistant=assistant)
    _begin(f"{prefix}/device/edgekit_…/config at {address}")
    run_bridge(bridge)


@app.command("json")
def json_lines(
    broker: str = typer.Option("mqtt://127.0.0.1:1883", "--broker", metavar="URL", help="The devices' broker."),
    target: str = typer.Option("", "--target-broker", metavar="URL", help="The broker to tell.  [default: the devices']"),
    prefix: str = typer.Option("edgekit-json", "--topic", help="Published below it: TOPIC/SITE/DEVICE."),
    client_id: str = typer.Option("edgekit-json", "--client-id", help="This bridge's name at the broker."),
    ca: str = CA,
    cert: str = CERT,
    key: str = KEY,
    insecure: bool = INSECURE,
) -> None:
    """Publish each window as one JSON message, for Telegraf and others that read no packed figures."""
    from edgekit.fleet.bridges.running import JsonBridge, run_bridge

    source = _address(broker, ca, cert, key, insecure)
    sink = _address(target, ca, cert, key, insecure) if target else source
    _begin(f"{prefix}/SITE/DEVICE at {sink}")
    run_bridge(JsonBridge(address=source, target=sink, prefix=prefix, client_id=client_id))
