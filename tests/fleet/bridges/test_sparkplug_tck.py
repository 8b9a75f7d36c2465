"""What the Sparkplug 3.0 specification asks of an edge node, one test an assertion, named by its tck-id (dashes: underscores).

Assertions about the same thing share a test and are listed in it. Those of host applications, of commands to devices, of data
sets, templates, property sets and of several servers do not apply: this edge node sends none of that (docs/bridges.md).
"""

from __future__ import annotations

import json

import pytest
from sparkplug_world import T0, Session, by_name, device, parse, rebirth_request, value_of, whole_session

from edgekit.errors import UsageError
from edgekit.fleet.bridges.sparkplug import DEVICE_METRICS, EdgeNode
from edgekit.fleet.packets import encode_connect

BIRTHS = ("NBIRTH", "DBIRTH")
DATA = ("NDATA", "DDATA")
BOOLEAN, INT64 = 11, 4


@pytest.fixture
def session() -> Session:
    return whole_session()


def online(is_online: bool, timestamp: int) -> bytes:
    return json.dumps({"online": is_online, "timestamp": timestamp}).encode()


# topics


def test_topic_structure(session):
    """topic-structure-namespace-a, ...-device-id-associated-message-types, ...-device-id-non-associated-message-types"""
    for message in session.said:
        parts = message.topic.split("/")
        assert parts[:2] == ["spBv1.0", "plant"]
        assert parts[3] == "lab"
        assert len(parts) == (4 if parts[2].startswith("N") else 5)


@pytest.mark.parametrize("bad", ["", "a/b", "a+", "#"])
def test_topic_structure_namespace_valid_ids(bad):
    """topic-structure-namespace-valid-group-id, -valid-edge-node-id; device ids are checked at the ingest's door"""
    for fields in ({"group": bad, "name": "n"}, {"group": "g", "name": bad}):
        with pytest.raises(UsageError):
            EdgeNode(software="x", **fields)


def test_topics_are_of_their_verbs(session):
    """topics-nbirth-topic, topics-ndata-topic, topics-dbirth-topic, topics-ddata-topic, topics-ddeath-topic, and the
    message-flow twins of them"""
    topics = {message.topic for message in session.said}
    assert {
        "spBv1.0/plant/NBIRTH/lab", "spBv1.0/plant/NDATA/lab", "spBv1.0/plant/DBIRTH/lab/cam-1",
        "spBv1.0/plant/DDATA/lab/cam-1", "spBv1.0/plant/DDEATH/lab/cam-1",
    } <= topics  # fmt: skip


def test_topic_structure_namespace_unique_device_id(session):
    born = [message.topic for message in session.rebirth() if "/DBIRTH/" in message.topic]
    assert len(born) == len(set(born)) == 2


# the connect


def test_principles_persistence_clean_session_311(session):
    connect = encode_connect(session.connects[0])
    assert connect[2:9] == b"\x00\x04MQTT\x04"
    assert connect[9] & 0x02


def test_message_flow_edge_node_birth_publish_will_message(session):
    """...-will-message-topic, -payload, -qos, -will-retained; topics-ndeath-topic; payloads-ndeath-will-message,
    -will-message-qos, -will-message-retain"""
    will = session.connects[0].will
    assert (will.topic, will.qos, will.is_retained) == ("spBv1.0/plant/NDEATH/lab", 1, False)
    assert encode_connect(session.connects[0])[9] & 0b0011_1100 == 0b0000_1100
    assert parse(will.payload).metrics


def test_topics_ndeath_payload(session):
    """topics-ndeath-seq, payloads-ndeath-seq, payloads-ndeath-bdseq, ...-will-message-payload-bdSeq"""
    payload = parse(session.connects[0].will.payload)
    assert not payload.HasField("seq")
    assert [(metric.name, metric.datatype, metric.long_value) for metric in payload.metrics] == [("bdSeq", INT64, 0)]


def test_topics_nbirth_bdseq_increment(session):
    """...-will-message-payload-bdSeq: by one each connect, 0 after 255"""
    for _ in range(257):
        session.connects.append(session.node.connecting())
    numbers = [parse(connect.will.payload).metrics[0].long_value for connect in session.connects]
    assert numbers == [*range(256), 0, 1]


def test_message_flow_edge_node_ncmd_subscribe(session):
    assert [(each.pattern, each.qos) for each in session.node.filters] == [("spBv1.0/plant/NCMD/lab", 1)]


def test_message_flow_edge_node_birth_publish_connect():
    """Nothing is published before the session stands."""
    session = Session()
    assert session.update(device("cam-1")) == []
    session.node.connecting()
    assert session.update(device("cam-1")) == []
    assert session.rebirth() == []


# births


def test_topics_nbirth_seq_num(session):
    """payloads-nbirth-seq, payloads-sequence-num-req-nbirth, ...-nbirth-payload-seq"""
    births = session.of("NBIRTH")
    assert len(births) == 2
    assert all(payload.HasField("seq") and payload.seq == 0 for _, payload in births)


def test_topics_nbirth_bdseq_matching(session):
    """topics-nbirth-bdseq-included, payloads-nbirth-bdseq, -bdseq-repeat, ...-nbirth-payload-bdSeq,
    operational-behavior-data-commands-rebirth-action-3: a rebirth has the same number"""
    session.connect()
    numbers = []
    for _, payload in session.of("NBIRTH"):
        metric = by_name(payload)["bdSeq"]
        assert metric.datatype == INT64
        numbers.append(metric.long_value)
    assert numbers == [0, 0, 1]
    assert parse(session.connects[-1].will.payload).metrics[0].long_value == 1


def test_topics_nbirth_rebirth_metric(session):
    """payloads-nbirth-rebirth-req, operational-behavior-data-commands-rebirth-name, -name-aliases, -datatype, -value"""
    for _, payload in session.of("NBIRTH"):
        metric = by_name(payload)["Node Control/Rebirth"]
        assert (metric.datatype, metric.boolean_value, metric.WhichOneof("value")) == (BOOLEAN, False, "boolean_value")
        assert not metric.HasField("alias")


def test_topics_dbirth_metric_reqs(session):
    """topics-nbirth-metric-reqs, operational-behavior-data-publish-nbirth, -dbirth: what data names was in the birth"""
    known: dict[str, set[int]] = {}
    for message in session.said:
        verb, payload = message.topic.split("/")[2], parse(message.payload)
        if verb == "NBIRTH":
            known = {"": {metric.alias for metric in payload.metrics if metric.HasField("alias")}}
        device_id = message.topic.split("/")[4] if verb.startswith("D") else ""
        if verb == "DBIRTH":
            known[device_id] = {metric.alias for metric in payload.metrics}
            assert {metric.name for metric in payload.metrics} == {name for name, _, _ in DEVICE_METRICS}
        if verb in DATA:
            assert {metric.alias for metric in payload.metrics} <= known[device_id]
            assert payload.metrics


def test_topics_nbirth_metrics(session):
    """topics-dbirth-metrics, payloads-metric-datatype-req, -datatype-value, -datatype-value-type,
    operational-behavior-data-publish-nbirth-values, -dbirth-values: null is said as null and has no value"""
    nulls = 0
    for verb in BIRTHS:
        for _, payload in session.of(verb):
            for metric in payload.metrics:
                assert metric.name
                assert 1 <= metric.datatype <= 12
                assert metric.is_null != (metric.WhichOneof("value") is not None)
                nulls += metric.is_null
    assert nulls


def test_payloads_alias_birth_requirement(session):
    """payloads-name-requirement, payloads-alias-uniqueness: over the edge node and its devices"""
    births = [message for message in session.said if message.topic.split("/")[2] in BIRTHS]
    at = next(place for place in range(1, len(births)) if "NBIRTH" in births[place].topic)
    for sequence in (births[:at], births[at:]):
        metrics = [metric for message in sequence for metric in parse(message.payload).metrics]
        aliases = [metric.alias for metric in metrics if metric.HasField("alias")]
        assert len(aliases) == len(set(aliases)) > 30
        assert {metric.name for metric in metrics if not metric.HasField("alias")} == {"bdSeq", "Node Control/Rebirth"}


def test_payloads_dbirth_order(session):
    """payloads-ndata-order, payloads-ddata-order, message-flow-device-birth-publish-nbirth-wait"""
    verbs = [message.topic.split("/")[2] for message in session.said]
    assert verbs[:3] == ["NBIRTH", "DBIRTH", "DBIRTH"]
    again = verbs.index("NBIRTH", 1)
    assert verbs[again : again + 4] == ["NBIRTH", "DBIRTH", "DBIRTH", "DBIRTH"]


def test_case_sensitivity_metric_names(session):
    for verb in BIRTHS:
        for _, payload in session.of(verb):
            names = [metric.name.lower() for metric in payload.metrics]
            assert len(names) == len(set(names))


# data


def test_payloads_sequence_num_incrementing(session):
    """payloads-sequence-num-always-included, payloads-dbirth-seq(-inc), -ndata-seq(-inc), -ddata-seq(-inc), -ddeath-seq(-inc,
    -number), topics-dbirth-seq, -ndata-seq-num, -ddata-seq-num, -ddeath-seq-num: up to 255, then 0"""
    for number in range(600):
        session.update(device("cam-1", refused=number), device("cam-2"))
    before = None
    for message in session.said:
        seq = parse(message.payload).seq
        is_birth = "/NBIRTH/" in message.topic
        assert seq == (0 if is_birth or before is None else (before + 1) % 256)
        before = seq
    assert len(session.said) > 600


def test_payloads_name_birth_data_requirement(session):
    """payloads-nbirth-timestamp, -dbirth-, -ndata-, -ddata-, -ddeath-timestamp, topics-*-timestamp,
    operational-behavior-data-publish-*-order: every metric has a time, and they do not go back"""
    last = 0
    for message in session.said:
        payload = parse(message.payload)
        assert payload.timestamp >= last
        last = payload.timestamp
        assert all(metric.timestamp == payload.timestamp for metric in payload.metrics)


def test_payloads_alias_data_cmd_requirement(session):
    """payloads-metric-datatype-not-req"""
    for verb in DATA:
        found = session.of(verb)
        assert found
        for _, payload in found:
            for metric in payload.metrics:
                assert not metric.name
                assert not metric.HasField("datatype")
                assert metric.HasField("alias")


def test_topics_ddata_payload(session):
    """topics-ndata-payload, operational-behavior-data-publish-nbirth-change, -dbirth-change: what has changed, no more"""
    assert session.update(device("cam-1", version="2.1.0", refused=1), device("cam-2")) == []
    said = session.update(device("cam-1", version="2.1.0", refused=2), device("cam-2", drift=0.5))
    births = [by_name(payload) for topic, payload in session.of("DBIRTH") if topic.endswith("cam-2")]
    assert [message.topic.split("/", 2)[2] for message in said] == ["DDATA/lab/cam-1", "DDATA/lab/cam-2"]
    (metric,) = parse(said[1].payload).metrics
    assert (metric.alias, metric.double_value) == (births[-1]["Model/Drift"].alias, 0.5)


def test_operational_behavior_device_ddeath(session):
    """payloads-ddeath-seq-number; a device that is gone from the fleet dies, too, and one that comes back is born again"""
    verbs = [message.topic.split("/", 2)[2] for message in session.said]
    died = verbs.index("DDEATH/lab/cam-1")
    assert "DBIRTH/lab/cam-1" in verbs[died:]
    assert "DDEATH/lab/cam-3" in verbs
    assert not parse(session.said[died].payload).metrics


# rebirth and commands


def test_operational_behavior_data_commands_rebirth_action_2(session):
    """...-rebirth-action-1: a whole birth sequence, before any data"""
    said = session.rebirth()
    assert [message.topic.split("/", 2)[2] for message in said] == ["NBIRTH/lab", "DBIRTH/lab/cam-1", "DBIRTH/lab/cam-2"]
    assert value_of(by_name(parse(said[1].payload))["Model/Refused"]) == 1


@pytest.mark.parametrize(
    "payload", [rebirth_request(value=False), rebirth_request(name="Node Control/Reboot"), b"\xff\xff", b""]
)
def test_other_commands_do_nothing(session, payload):
    """operational-behavior-data-commands-ncmd-rebirth-name, -value"""
    assert session.hear("spBv1.0/plant/NCMD/lab", payload) == []
    assert session.hear("spBv1.0/plant/NCMD/another", rebirth_request()) == []


# the end


def test_operational_behavior_edge_node_intentional_disconnect_ndeath(session):
    """payloads-ndeath-will-message-publisher-disconnect-mqtt311: the certificate of this session"""
    goodbye = session.node.leaving()
    assert goodbye.topic == "spBv1.0/plant/NDEATH/lab"
    assert goodbye.payload == session.connects[-1].will.payload
    assert session.update(device("cam-9")) == []


# primary host

HOST = "spBv1.0/STATE/scada"


def test_message_flow_edge_node_birth_publish_phid_wait():
    """...-phid-wait-online, operational-behavior-edge-node-birth-sequence-wait,
    operational-behavior-primary-application-state-with-multiple-servers-state-subs"""
    session = Session(primary_host="scada")
    assert [each.pattern for each in session.node.filters] == ["spBv1.0/plant/NCMD/lab", HOST]
    session.update(device("cam-1"))
    session.connect()
    session.hear(HOST, online(False, T0))
    assert session.said == []
    assert session.rebirth() == []
    said = session.hear(HOST, online(True, T0 + 1))
    assert [message.topic.split("/")[2] for message in said] == ["NBIRTH", "DBIRTH"]
    assert session.hear(HOST, online(True, T0 + 2)) == []


def test_message_flow_edge_node_birth_publish_phid_wait_id():
    session = Session(primary_host="scada")
    session.connect()
    assert session.hear("spBv1.0/STATE/another", online(True, T0)) == []
    assert not session.node.is_born


@pytest.mark.parametrize(
    "state",
    [b"", b"[]", b"ONLINE", b'{"online": "true", "timestamp": 1}', b'{"online": true}', b'{"online": true, "timestamp": "x"}'],
)
def test_state_that_is_none_is_no_host(state):
    session = Session(primary_host="scada")
    session.connect()
    assert session.hear(HOST, state) == []


def test_message_flow_edge_node_birth_publish_phid_offline():
    """operational-behavior-edge-node-termination-host-offline, -offline-reconnect: the next connect has the next bdSeq, and
    waits again"""
    session = Session(primary_host="scada")
    session.connect()
    session.hear(HOST, online(True, T0))
    session.hear(HOST, online(False, T0 + 1))
    assert session.node.must_reconnect
    session.connect()
    assert not session.node.must_reconnect
    assert len(session.of("NBIRTH")) == 1
    session.hear(HOST, online(True, T0 + 2))
    assert [by_name(payload)["bdSeq"].long_value for _, payload in session.of("NBIRTH")] == [0, 1]


def test_host_is_waited_for_again_after_a_lost_connection():
    """operational-behavior-edge-node-birth-sequence-wait, in each session"""
    session = Session(primary_host="scada")
    session.connect()
    session.hear(HOST, online(True, T0))
    session.connect()
    assert len(session.of("NBIRTH")) == 1
    session.hear(HOST, online(True, T0))
    assert len(session.of("NBIRTH")) == 2


def test_operational_behavior_edge_node_termination_host_offline_timestamp():
    """message-flow-edge-node-birth-publish-phid-wait-timestamp: a state that is older than the last is of no account"""
    session = Session(primary_host="scada")
    session.connect()
    session.hear(HOST, online(True, T0 + 10))
    session.hear(HOST, online(False, T0 + 9))
    assert not session.node.must_reconnect
    session.hear(HOST, online(False, T0 + 10))
    assert session.node.must_reconnect
