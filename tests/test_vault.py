"""Secrets out of a vault, against a real OpenBao: read at the start, asked for again, and kept while it is away."""

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway import config as configuration
from gateway.config import ConfigurationError
from gateway.vault import VaultReader, fetch
from tests.serving import CONFIGURATION, ENVIRON, Program, serving, whsec
from tests.test_renewal import looks, status, unreadable

OLD, NEW = (whsec(f"{name}-secret-of-32-bytes-0000000000") for name in ("older", "newer"))
BAO = Path(sys.executable).with_name("bao")
pytestmark = pytest.mark.skipif(not BAO.exists(), reason="there is no OpenBao for this machine")


@dataclass
class Bao:
    """A server in memory, with TLS of its own authority."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def call(self, method: str, path: str, body: object = None) -> Any:
        trusted = ssl.create_default_context(cafile=str(self.folder / "vault-ca.pem"))
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"X-Vault-Token": "root"},
        )
        with urllib.request.urlopen(request, context=trusted) as answer:
            told = answer.read()
        return json.loads(told) if told else None

    def put(self, path: str = "sluicegate/odoo", **fields: object) -> None:
        self.call("POST", f"/v1/secret/data/{path}", {"data": fields})


@pytest.fixture(scope="module")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bao]:
    folder = tmp_path_factory.mktemp("bao")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [BAO, "server", "-dev", "-dev-tls", f"-dev-tls-cert-dir={folder}", "-dev-root-token-id=root", "-dev-no-store-token",
               f"-dev-listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={"HOME": str(folder), "PATH": "/usr/bin:/bin"})
    bao = Bao(folder, port, process)
    try:
        end = time.monotonic() + 30
        while True:
            with suppress(OSError):
                bao.call("GET", "/v1/sys/health")
                break
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.1)
        bao.call("POST", "/v1/sys/auth/approle", {"type": "approle"})
        policy = 'path "secret/data/sluicegate/*" { capabilities = ["read"] }'
        bao.call("POST", "/v1/sys/policies/acl/gateway", {"policy": policy})
        bao.call("POST", "/v1/auth/approle/role/gateway", {"token_policies": ["gateway"], "token_ttl": "1h"})
        yield bao
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def place(bao: Bao, tmp_path: Path) -> Path:
    shutil.copy(bao.folder / "vault-ca.pem", tmp_path / "ca.pem")
    (tmp_path / "token").write_text("root\n")
    return tmp_path


def section(bao: Bao, login: str = "token: file:token", more: str = "") -> str:
    return f"vault: {{{{url: '{bao.url}', {login}, ca: file:ca.pem, allow: [127.0.0.1/32]{more}}}}}"


IN_THE_VAULT = CONFIGURATION.replace("secrets: [env:SHOP_SECRET]", "secrets: ['vault:secret/sluicegate/odoo#webhook']")


def loaded(folder: Path, vault: str, text: str = IN_THE_VAULT) -> configuration.Config:
    path = folder / "sluicegate.yaml"
    path.write_text(text.format(dsn="env:DSN", partner="https://partner.example", more=vault.format()))
    return configuration.load(path, {**ENVIRON, "DSN": "postgresql://nobody@nowhere/x"})


def told(folder: Path, vault: str, text: str = IN_THE_VAULT) -> str:
    with pytest.raises(ConfigurationError) as error:
        loaded(folder, vault, text)
    return str(error.value)


@asynccontextmanager
async def running(bao: Bao, place: Path, dsn: str, refresh: str = "1s"):
    text = IN_THE_VAULT.replace("{more}", section(bao, more=f", refresh: {refresh}"))
    async with serving(place, dsn, "http://127.0.0.1:1", configured=text) as program:
        await program.service.upkeep.stop()
        yield program


async def asked_again(program: Program) -> None:
    program.service.renewal._asked_at = float("-inf")
    await looks(program, 1)


def by_role(bao: Bao, place: Path) -> str:
    role = bao.call("GET", "/v1/auth/approle/role/gateway/role-id")["data"]["role_id"]
    proof = bao.call("POST", "/v1/auth/approle/role/gateway/secret-id")["data"]["secret_id"]
    (place / "role").write_text(role)
    (place / "proof").write_text(proof)
    return "role_id: file:role, secret_id: file:proof"


def test_a_secret_is_read_by_a_token(bao: Bao, place: Path) -> None:
    bao.put(webhook=OLD)
    config = loaded(place, section(bao))
    (timed,) = config.sources["odoo"].secrets
    assert timed.secret.reveal() == OLD
    assert timed.secret.origin == "vault:secret/sluicegate/odoo#webhook"
    assert OLD not in repr(config)
    assert repr(timed.secret) == "***"


def test_a_secret_is_read_by_a_role(bao: Bao, place: Path) -> None:
    bao.put(webhook=OLD)
    config = loaded(place, section(bao, by_role(bao, place)))
    assert config.sources["odoo"].secrets[0].secret.reveal() == OLD


def test_what_cannot_be_read_is_told_with_its_line_and_mend(bao: Bao, place: Path) -> None:
    bao.put(webhook=OLD, number=7, empty="")
    bao.call("POST", "/v1/secret/data/others/x", {"data": {"webhook": OLD}})
    there = "vault:secret/sluicegate/odoo#webhook"
    for instead, says in {
        "vault:secret/sluicegate/other#webhook": "which is not there; write it, or correct the path",
        "vault:secret/sluicegate/odoo#webhok": "which has no field webhok",
        "vault:secret/sluicegate/odoo#number": "which has no text in number",
        "vault:secret/sluicegate/odoo#empty": "which has no text in empty",
        "vault:secret/others/x#webhook": "answered 403 Forbidden; let the policy of its token read it",
        "vault:nothing/x#webhook": "let the policy of its token read it",
        "vault:secret": "has no place behind vault:; write it as vault:secret/path#field",
        "vault:secret/../x#webhook": "write it as vault:secret/path#field",
    }.items():
        said = told(place, section(bao, by_role(bao, place)), IN_THE_VAULT.replace(there, instead))
        assert says in said, said
        assert "sluicegate.yaml:" in said
        assert "sources.odoo.secrets[0]" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: "", "but no vault is named; add vault: at the top"),
        (lambda text: text.replace("token: file:token, ", ""), "vault.token is missing; write token: file:PATH, or role_id: and secret_id:"),
        (lambda text: text.replace("token: file:token", "token: file:token, role_id: file:token"), "vault.token stands beside role_id or secret_id"),
        (lambda text: text.replace("token: file:token", "token: root"), "vault.token is a secret and must not be written out here"),
        (lambda text: text.replace("https://127.0.0.1", "http://vault.example"), "what comes in the clear is no secret; write https"),
        (lambda text: text.replace(", allow: [127.0.0.1/32]", ""), "its address is not a public one; add `allow: [its network]`"),
        (lambda text: text.replace(", ca: file:ca.pem", ""), "its certificate is not trusted"),
        (lambda text: text.replace("file:token", "file:proof"), "answered 403 Forbidden"),
        (lambda text: text.replace("token: file:token", "role_id: file:proof, secret_id: file:proof"), "the login answered 400 Bad Request; see that role_id and secret_id count"),
    ],
)  # fmt: skip
def test_a_vault_that_cannot_be_asked_is_told_with_its_mend(bao: Bao, place: Path, change: Any, says: str) -> None:
    (place / "proof").write_text("made-up")
    assert says in told(place, change(section(bao)))


def test_a_vault_that_is_away_at_the_start_opens_no_door(bao: Bao, place: Path, unused_tcp_port: int) -> None:
    away = section(bao).replace(str(bao.port), str(unused_tcp_port))
    assert "refused the connection; see that it runs" in told(place, away)


async def test_a_secret_that_changes_in_the_vault_counts_without_a_restart(bao: Bao, place: Path, dsn: str) -> None:
    bao.put(webhook=OLD)
    async with running(bao, place, dsn) as program:
        assert await status(program, OLD, 1) == 202
        bao.put(webhook=NEW)
        await asked_again(program)
        assert (await status(program, OLD, 2), await status(program, NEW, 3)) == (401, 202)
        bao.put(webhook="nonsense")
        for _ in range(3):
            await asked_again(program)
            await looks(program)
        assert await status(program, NEW, 4) == 202
        assert await unreadable(program) == ["vault:secret/sluicegate/odoo#webhook"]


async def test_it_is_asked_again_as_often_as_it_says(bao: Bao, place: Path, dsn: str) -> None:
    bao.put(webhook=OLD)
    async with running(bao, place, dsn, refresh="2s") as program:
        await looks(program, 1)
        bao.put(webhook=NEW)
        await looks(program, 3)
        assert await status(program, OLD, 1) == 202
        await asyncio.sleep(2)
        await looks(program, 1)
        assert await status(program, NEW, 2) == 202


async def test_while_it_is_away_the_last_secret_counts_and_a_reload_does_not_lose_it(
    bao: Bao, place: Path, dsn: str
) -> None:
    bao.put(webhook=OLD)
    async with running(bao, place, dsn) as program:
        (place / "token").write_text("revoked")
        await looks(program)
        await asked_again(program)
        assert await unreadable(program) == ["vault:secret/sluicegate/odoo#webhook"]
        assert await status(program, OLD, 1) == 202
        await program.service.reload()
        await looks(program)
        assert await status(program, OLD, 2) == 202
        (place / "token").write_text("root")
        bao.put(webhook=NEW)
        await looks(program)
        await asked_again(program)
        assert (await status(program, OLD, 3), await status(program, NEW, 4)) == (401, 202)
        assert await unreadable(program) == []


async def test_a_role_logs_in_once_and_again_when_its_token_is_taken_away(bao: Bao, place: Path) -> None:
    bao.put(webhook=OLD)
    config = await asyncio.to_thread(loaded, place, section(bao, by_role(bao, place)))
    assert config.vault is not None
    reader, origin = VaultReader(config.vault), "vault:secret/sluicegate/odoo#webhook"
    assert (await reader.read([origin]))[origin].text == OLD
    first = reader._token
    await reader.read([origin])
    assert reader._token == first
    await asyncio.to_thread(bao.call, "POST", "/v1/auth/token/revoke", {"token": first})
    assert (await reader.read([origin]))[origin].text == OLD
    assert reader._token != first


async def test_it_can_be_asked_from_within_a_loop(bao: Bao, place: Path) -> None:
    bao.put(webhook=OLD)
    config = await asyncio.to_thread(loaded, place, section(bao))
    assert config.vault is not None
    assert fetch(config.vault, ["vault:secret/sluicegate/odoo#webhook"]).keys() == {
        "vault:secret/sluicegate/odoo#webhook"
    }
