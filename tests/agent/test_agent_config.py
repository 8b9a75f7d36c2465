"""Configuration: precedence, typo hints, and what is refused."""

from __future__ import annotations

import pytest

from edgekit.agent.config import default_device, load_config, parse_broker
from edgekit.errors import UsageError

LOCAL = {"model": "m", "root": "r.json", "repository": "http://127.0.0.1:8600"}


def refused(code, **flags):
    with pytest.raises(UsageError) as caught:
        load_config(flags=flags, environ={})
    assert caught.value.code == code
    return caught.value


def test_flag_over_environment_over_file_over_default(tmp_path):
    path = tmp_path / "agent.toml"
    path.write_text('site = "file"\ndevice = "file"\nport = 1\n[labels]\nline = "3"\n')
    environ = {"EDGEKIT_AGENT_DEVICE": "env", "EDGEKIT_AGENT_PORT": "2"}
    config = load_config(path, flags={"port": 3, "site": None}, environ=environ)
    assert (config.site, config.device, config.port, config.host) == ("file", "env", 3, "127.0.0.1")
    assert config.labels == {"line": "3"}


def test_file_named_by_the_environment(tmp_path):
    path = tmp_path / "agent.toml"
    path.write_text('site = "plant"')
    assert load_config(environ={"EDGEKIT_AGENT_CONFIG": str(path)}).site == "plant"


def test_labels_from_the_environment():
    assert load_config(environ={"EDGEKIT_AGENT_LABELS": "a=1,b=2"}).labels == {"a": "1", "b": "2"}


def test_unknown_key_gets_the_nearest_name(tmp_path):
    path = tmp_path / "agent.toml"
    path.write_text('repositry = "x"')
    with pytest.raises(UsageError) as caught:
        load_config(path, environ={})
    assert caught.value.code == "config.unknown_key"
    assert '"repository"' in caught.value.hint


def test_unknown_environment_variable_refused():
    with pytest.raises(UsageError, match="EDGEKIT_AGENT_BROKR"):
        load_config(environ={"EDGEKIT_AGENT_BROKR": "x"})


def test_missing_and_malformed_file(tmp_path):
    with pytest.raises(UsageError) as caught:
        load_config(tmp_path / "none.toml", environ={})
    assert caught.value.code == "config.unreadable"
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(UsageError) as caught:
        load_config(tmp_path / "bad.toml", environ={})
    assert caught.value.code == "config.malformed"


@pytest.mark.parametrize(
    "flags",
    [
        {"port": 70_000},
        {"port": "many"},
        {"poll_s": 0},
        {"outbox_bytes": 100},
        {"window_s": float("nan")},
        {"threads": 0},
        {"drain_s": float("nan")},
        {"max_request_bytes": 0},
        {"disk_reserve_bytes": -1},
        {"broker": "mqtt://[x"},
        {"repository": "http://[x", "model": "m", "root": "r"},
        {"repository": "http://127.0.0.1:99999", "model": "m", "root": "r"},
        {"repository": "https://u:p@example.com", "model": "m", "root": "r"},
        {"broker": "tcp://x"},
        {"broker": "mqtt://127.0.0.1:99999"},
        {"broker": "mqtt://u:p@127.0.0.1"},
        {"repository": "ftp://x", "model": "m", "root": "r"},
        {"repository": "http://127.0.0.1"},
        {"repository": "http://127.0.0.1", "model": "m"},
    ],
)
def test_invalid_value_refused(flags):
    refused("config.invalid", **flags)


@pytest.mark.parametrize("flags", [{"device": "a/b"}, {"site": "a+b"}, {"device": "Cam"}])
def test_name_that_fits_no_topic_refused(flags):
    refused("telemetry.name", **flags)


def test_plain_traffic_off_loopback_refused_unless_allowed():
    refused("config.insecure", **LOCAL | {"repository": "http://example.com"})
    refused("config.insecure", broker="mqtt://10.0.0.1")
    refused("config.insecure", host="0.0.0.0")
    assert load_config(flags={"host": "0.0.0.0", "allow_insecure": True}, environ={}).host
    assert load_config(flags={"broker": "mqtt://10.0.0.1", "allow_insecure": True}, environ={}).broker
    assert load_config(flags=LOCAL | {"repository": "https://example.com"}, environ={}).repository


@pytest.mark.parametrize(
    ("url", "port", "is_tls"),
    [("mqtts://b.example.com", 8883, True), ("mqtt://localhost", 1883, False), ("mqtt://[::1]:99", 99, False)],
)
def test_broker_url(url, port, is_tls):
    broker = parse_broker(load_config(flags={"broker": url}, environ={}))
    assert (broker.port, broker.is_tls) == (port, is_tls)


def test_default_device_is_stable_and_valid():
    assert default_device() == default_device()
    assert load_config(environ={}).device == default_device()
