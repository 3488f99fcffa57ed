"""What is built from here works where nothing else is: a wheel in an empty environment."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")
CONFIGURATION = """
sources:
  shop: {scheme: api-key, header: X-Api-Key, keys: [env:SHOP_KEY], accepts: [order]}
policies:
  order: {version: 1, purpose: orders, type: shop.order, subject: "order/{id}", keep: {id: {from: id, type: int}}}
destinations:
  books: {connector: http, url: "https://books.example/orders", secret: env:BOOKS_SECRET}
routes:
  orders: {when: {source: shop}, to: [books]}
"""
SECRETS = {
    "SHOP_KEY": "shop.0123456789abcdef0123456789abcdef",
    "BOOKS_SECRET": "whsec_Ym9va3Mtc2VjcmV0LW9mLTMyLWJ5dGVzLTAwMDAwMDA=",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    uv("build", "--wheel", "--out-dir", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment that holds the wheel and what it asks for, in the versions that are locked."""
    folder = tmp_path_factory.mktemp("installed")
    locked, environment = folder / "locked.txt", folder / "venv"
    uv("export", "--locked", "--no-dev", "--no-emit-project", "--no-hashes", "--output-file", locked)
    uv("venv", "--python", sys.executable, environment)
    uv("pip", "install", "--python", environment / "bin/python", "--constraints", locked, wheel)
    return environment / "bin"


def test_the_command_is_there_and_tells_its_version(installed: Path) -> None:
    assert run(installed / "sluicegate", "--version") == "sluicegate 0.1.0\n"


def test_the_schema_of_the_configuration_is_told(installed: Path) -> None:
    assert "destinations" in json.loads(run(installed / "sluicegate", "config", "schema"))["properties"]


def test_it_has_everything_that_it_needs_beside_its_code(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    beside = {
        str(path.relative_to(ROOT))
        for package in ("gateway", "outbox", "connectors", "dead_letter", "observability", "sandbox")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "outbox/migrations/0001_outbox.sql" in beside
    assert beside <= packed
    assert not [name for name in packed if name.startswith(("tests/", "benchmarks/"))]


def test_it_brings_its_own_postgres_and_its_schema(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "sluicegate.yaml").write_text(CONFIGURATION)
    said = run(installed / "sluicegate", "migrate", cwd=tmp_path)
    assert "applied 0001_outbox" in said
    assert run(installed / "sluicegate", "migrate", cwd=tmp_path).endswith("The database is up to date.\n")


def test_without_the_extra_the_demo_says_what_to_install(installed: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [installed / "sluicegate", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert ended.returncode == 1
    assert "pip install 'sluicegate[demo]'" in ended.stderr


def uv(*arguments: str | Path) -> None:
    environment = {**os.environ, "UV_SYSTEM_CERTS": "true"}  # it trusts whom the machine trusts, as the Makefile's
    ended = subprocess.run(
        [UV, "--quiet", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """As in an environment without anything of this one."""
    environment = {"PATH": os.defpath, "HOME": "/nowhere", "LANG": "C.UTF-8", **SECRETS}
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
