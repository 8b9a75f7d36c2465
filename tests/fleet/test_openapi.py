"""The API's description of itself: whole, valid, and what the server really answers."""

from __future__ import annotations

import re

import jsonschema
import pytest
from fastapi.testclient import TestClient

from edgekit.fleet import assembly
from edgekit.fleet.config import FleetConfig
from edgekit.fleet.server import make_app
from edgekit.fleet.store import Store

READERS = {"/api/v1/fleet": "FleetView", "/api/v1/devices": "DevicePage", "/api/v1/me": "Me", "/api/v1/alerts": "AlertPage"}
NO_BODY = {
    ("post", "/api/v1/contacts/{name}/test"),
    ("post", "/api/v1/work/{number}/take"),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    config = FleetConfig(database=str(tmp_path_factory.mktemp("openapi") / "fleet.db"))
    store = Store(config.database)
    services = assembly.assemble(config, store)
    yield TestClient(make_app(store, None, services=services), base_url="http://127.0.0.1")
    store.close()


@pytest.fixture(scope="module")
def document(client):
    return client.get("/api/v1/openapi.json").json()


def operations(document):
    return [(method, path, call) for path, item in document["paths"].items() for method, call in item.items()]


def test_every_reference_leads_somewhere(document):
    text = str(document)
    names = set(re.findall(r"#/components/schemas/([\w.-]+)", text))
    assert len(names) > 40
    assert names <= set(document["components"]["schemas"])


def test_every_operation_says_what_it_does_and_takes(document):
    found = operations(document)
    assert len(found) > 50
    for method, path, call in found:
        assert call.get("description"), (method, path)
        assert call.get("tags"), (method, path)
        if method in {"post", "put"} and (method, path) not in NO_BODY:
            schema = call["requestBody"]["content"]["application/json"]["schema"]
            assert "$ref" in schema, (method, path)
    assert document["security"] == [{"token": []}]


@pytest.mark.parametrize(("path", "name"), READERS.items())
def test_answer_fits_its_schema(client, document, path, name):
    schema = document["components"]["schemas"][name] | {"components": document["components"]}
    jsonschema.validate(client.get(path).json(), schema)


def test_pages_are_not_part_of_the_api(document):
    assert [path for path in document["paths"] if not path.startswith("/api/v1/")] == ["/metrics"]
