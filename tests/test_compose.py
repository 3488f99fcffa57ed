"""The container set-up, held against the Compose Specification and against the program that it runs.

No container engine is needed: what is written in one file must be so in the other.
"""

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from ruamel.yaml import YAML

from connectors.http import HttpSettings
from connectors.settings import Secret
from gateway.cli import main
from gateway.config import load
from observability.names import MetricName

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
OURS = ("gateway", "dispatcher", "migrate")
FOLDER = "/srv/sluicegate"


def yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml(ROOT / "docker-compose.yml")
    return read


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run([DEPLOY / "make-secrets", folder], check=True)
    return dict(line.split("=", 1) for line in (folder / ".env").read_text().splitlines())


def test_it_is_what_the_compose_specification_allows(compose: dict[str, Any]) -> None:
    schema = json.loads((ROOT / "tests/compose_spec/compose-spec.json").read_text())
    specification = jsonschema.Draft7Validator(schema)
    specification.validate(compose)
    assert not specification.is_valid(compose | {"services": {"gateway": {"comand": []}}})


def test_there_is_what_it_names(compose: dict[str, Any]) -> None:
    services, named = compose["services"], set(compose["volumes"])
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= set(services), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith("./") else source in named, volume


def test_without_the_demo_it_is_gateway_dispatcher_and_their_postgres(compose: dict[str, Any]) -> None:
    plain = {name for name, service in compose["services"].items() if "profiles" not in service}
    assert plain == {*OURS, "postgres"}
    demo = {name for name, service in compose["services"].items() if service.get("profiles") == ["demo"]}
    assert demo == {"odoo", "odoo-postgres", "n8n", "prometheus", "grafana", "collector"}


def test_every_image_is_pinned(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[a-z0-9/-]+:v?\d+(\.\d+)+(-[a-z0-9]+)?", service["image"]), name
    for image in re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", image)


@pytest.mark.parametrize("name", OURS)
def test_its_commands_are_the_programs(compose: dict[str, Any], name: str) -> None:
    told = parsed(compose["services"][name]["command"])
    if name in {"gateway", "dispatcher"}:
        assert told["role"] == name
    assert f"{FOLDER}/{told['path']}" == configuration_of(compose["services"][name])


def test_the_containers_own_command_is_the_programs() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert words(dockerfile, "ENTRYPOINT") == ["sluicegate"]
    assert parsed(words(dockerfile, "CMD"))["path"] == Path("sluicegate.yaml")
    assert re.search(rf"^WORKDIR {FOLDER}$", dockerfile, re.MULTILINE)


@pytest.mark.parametrize("name", OURS)
def test_the_environment_is_what_the_configuration_asks_for(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert "./deploy/sluicegate.yaml" in [volume.split(":")[0] for volume in service["volumes"]]
    asked = set(re.findall(r"\benv:(\w+)", (DEPLOY / "sluicegate.yaml").read_text()))
    assert set(service["environment"]) == asked


def test_the_configuration_is_good(compose: dict[str, Any], secrets: dict[str, str]) -> None:
    environment = {key: filled(value, secrets) for key, value in compose["services"]["gateway"]["environment"].items()}
    config = load(DEPLOY / "sluicegate.yaml", environment)
    assert isinstance(config.database, Secret)
    assert config.database.reveal().endswith(f":{secrets['POSTGRES_PASSWORD']}@postgres/sluicegate")
    assert [listen.port for listen in config.serve.listen] == [8470]
    assert config.observability.otlp is None
    assert not config.warnings
    (network,) = compose["networks"]["default"]["ipam"]["config"]
    for destination in config.destinations.values():
        assert isinstance(destination.settings, HttpSettings)
        host = re.fullmatch(r"http://([\w-]+):\d+/\S+", destination.settings.url)
        assert host
        assert host[1] in compose["services"]
        assert [str(allowed) for allowed in destination.settings.allow] == [network["subnet"]]


def test_there_is_no_default_for_anything_secret(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|KEY|^DATABASE$", key):
                assert re.search(r"\$\{[A-Z0-9_]+:\?run deploy/make-secrets\}", value), f"{name}: {key}"


def test_the_script_makes_every_secret_that_is_asked_for_and_keeps_what_is_there(
    compose: dict[str, Any], tmp_path: Path
) -> None:
    asked = {name for value in strings(compose) for name in re.findall(r"\$\{(\w+):\?", value)}
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=mine\n")
    texts = []
    for _ in range(2):
        subprocess.run([DEPLOY / "make-secrets", tmp_path], check=True)
        texts.append((tmp_path / ".env").read_text())
    assert texts[0] == texts[1]
    made = dict(line.split("=", 1) for line in texts[0].splitlines())
    assert set(made) == asked
    assert made["POSTGRES_PASSWORD"] == "mine"
    assert len(set(made.values())) == len(made)
    assert all(len(value) >= 32 for name, value in made.items() if name != "POSTGRES_PASSWORD")
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0


def test_everything_is_published_on_this_machine_alone(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_program_in_a_container_is_not_root_and_cannot_become_it(compose: dict[str, Any]) -> None:
    _, final = (ROOT / "Dockerfile").read_text().rsplit("\nFROM ", 1)
    assert re.search(r"^USER sluicegate$", final, re.MULTILINE)
    assert final.index("\nUSER ") < final.index("\nENTRYPOINT ")
    for name in OURS:
        service = compose["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


def test_the_image_is_built_of_what_is_there_and_what_a_package_needs() -> None:
    dockerfile, project = (ROOT / "Dockerfile").read_text(), tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {word for line in re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile, re.MULTILINE) for word in line.split()}
    packages = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert copied == packages | {"pyproject.toml", "uv.lock", "LICENSE", "README.md"}
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_through
    assert all((ROOT / path).exists() for path in copied)
    (uv,) = re.findall(r"uv==([\d.]+)", dockerfile)
    assert f"UV_VERSION := {uv}\n" in (ROOT / "Makefile").read_text()


def test_what_prometheus_asks_is_there(compose: dict[str, Any]) -> None:
    for job in yaml(DEPLOY / "prometheus.yml")["scrape_configs"]:
        for target in job["static_configs"][0]["targets"]:
            host, port = target.split(":")
            assert host in compose["services"]
            if host == "collector":
                assert yaml(DEPLOY / "collector.yaml")["exporters"]["prometheus"]["endpoint"].endswith(f":{port}")


def test_the_collector_joins_only_what_it_has() -> None:
    collector = yaml(DEPLOY / "collector.yaml")
    for pipeline in collector["service"]["pipelines"].values():
        assert set(pipeline["receivers"]) <= {*collector["receivers"], *collector["connectors"]}
        assert set(pipeline["exporters"]) <= {*collector["exporters"], *collector["connectors"]}
        assert set(pipeline.get("processors", ())) <= set(collector["processors"])


def test_the_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/sluicegate.json").read_text())
    (source,) = yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == source["uid"]
        for target in panel["targets"]:
            for metric in re.findall(r"\bsluicegate_\w+", target["expr"]):
                assert metric.removesuffix("_bucket") in set(MetricName), metric


def parsed(arguments: list[str]) -> Mapping[str, Any]:
    """What click makes of them; an option or a command that does not exist is an error."""
    command: click.Command = main
    context = click.Context(main, info_name="sluicegate")
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, arguments)
        assert found
        command = found
    return command.make_context(name, arguments, parent=context).params


def configuration_of(service: Mapping[str, Any]) -> str:
    (target,) = [
        volume.split(":")[1] for volume in service["volumes"] if volume.startswith("./deploy/sluicegate.yaml:")
    ]
    return str(target)


def words(dockerfile: str, instruction: str) -> list[str]:
    (line,) = re.findall(rf"^{instruction} (\[.*\])$", dockerfile, re.MULTILINE)
    said: list[str] = json.loads(line)
    return said


def filled(value: str, secrets: Mapping[str, str]) -> str:
    """As Compose fills in ${NAME:?…} and ${NAME:-…}."""
    asked = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: secrets[found[1]], value)
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", asked)


def strings(tree: object) -> Iterator[str]:
    match tree:
        case str():
            yield tree
        case dict():
            for value in tree.values():
                yield from strings(value)
        case list():
            for value in tree:
                yield from strings(value)
        case _:
            return
