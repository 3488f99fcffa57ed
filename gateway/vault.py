"""Secrets out of OpenBao or HashiCorp Vault: version 2 of its key-value engine, over HTTPS, by a token or an AppRole.

vault:secret/sluicegate/odoo#webhook      GET /v1/secret/data/sluicegate/odoo, and of its data the field `webhook`
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http import HTTPStatus
from typing import Any

import msgspec
from yarl import URL

from connectors.http_client import Answer, Client, words
from connectors.settings import Reference
from gateway.config_document import VAULTED
from gateway.config_sections import Vault
from observability.tracing import Tracing

LONGEST = timedelta(seconds=10)  # for one answer
LARGEST = 256 * 1024


class VaultReader:
    """Asks one vault.  It keeps the token that it was given for its role, until that is over or refused."""

    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self._tracing = Tracing.start(None, 0, "")
        self._token = "" if vault.token is None else vault.token.reveal()
        self._until = float("inf") if self._token else float("-inf")

    async def read(self, origins: Sequence[str]) -> Mapping[str, Reference]:
        """What each leads to now; of one that cannot be read, why not and what to do."""
        places = {origin: VAULTED.fullmatch(origin) for origin in origins}
        paths = sorted({f"/v1/{place['mount']}/data/{place['path']}" for place in places.values() if place})
        client = Client(
            URL(self.vault.url),
            allow=self.vault.allow,
            ca=self.vault.ca,
            timeout=LONGEST,
            concurrency=4,
            agent="sluicegate",
        )
        try:
            found = {path: await self._data(client, path) for path in paths}
        finally:
            await client.close()
        return {
            origin: _field(origin, place["field"], found[f"/v1/{place['mount']}/data/{place['path']}"])
            for origin, place in places.items()
            if place
        }

    async def _data(self, client: Client, path: str) -> "Mapping[str, Any] | str":
        """The fields that stand at `path`, or why they cannot be read."""
        if why := await self._log_in(client):
            return why
        answer = await self._ask(client, "GET", path, token=self._token)
        if self.vault.token is None and isinstance(answer, Answer) and answer.status == HTTPStatus.FORBIDDEN:
            self._until = float("-inf")  # the token may have been revoked: a new one is asked for, once
            if why := await self._log_in(client):
                return why
            answer = await self._ask(client, "GET", path, token=self._token)
        if not isinstance(answer, Answer):
            return f"cannot be read: {answer}"
        match answer.status:
            case HTTPStatus.OK:
                return _Stored.of(answer.body)
            case HTTPStatus.NOT_FOUND:
                return "is not there; write it, or correct the path"
            case HTTPStatus.FORBIDDEN:
                return f"cannot be read: {words(answer.status)}; let the policy of its token read it"
            case status:
                return f"cannot be read: {words(status)}; see what the vault's log says"

    async def _log_in(self, client: Client) -> str | None:
        """Why that cannot be; None if there is a token now."""
        if time.monotonic() < self._until:
            return None
        if self.vault.role_id is None or self.vault.secret_id is None:
            return "cannot be read without a token"
        body = msgspec.json.encode({"role_id": self.vault.role_id.reveal(), "secret_id": self.vault.secret_id.reveal()})
        answer = await self._ask(client, "POST", "/v1/auth/approle/login", body=body)
        if not isinstance(answer, Answer):
            return f"cannot be read: {answer}"
        try:
            granted = msgspec.json.decode(answer.body, type=_Login).auth
        except msgspec.MsgspecError:
            return f"cannot be read: the login {words(answer.status)}; see that role_id and secret_id count"
        self._token = granted.client_token
        self._until = time.monotonic() + (granted.lease_duration * 0.75 or float("inf"))
        return None

    async def _ask(
        self, client: Client, method: str, path: str, *, token: str | None = None, body: bytes | None = None
    ) -> Answer | str:
        """Its answer, or why there is none."""
        headers = {"x-vault-request": "true"}
        if token is not None:
            headers["x-vault-token"] = token
        if self.vault.namespace is not None:
            headers["x-vault-namespace"] = self.vault.namespace
        try:
            answer = await client.send(
                method,
                URL(self.vault.url + path, encoded=True),
                headers=headers,
                tracing=self._tracing,
                body=body,
                read=LARGEST,
            )
        except ValueError:
            return "its token, role or namespace has a character that no header can hold"
        return (
            answer if isinstance(answer, Answer) else f"{answer.reason}; see that it runs, and what `vault` says of it"
        )


def fetch(vault: Vault, origins: Sequence[str]) -> Mapping[str, Reference]:
    """As VaultReader does, once, and waiting for it: in a loop of its own, whatever loop this runs in."""
    with ThreadPoolExecutor(1, thread_name_prefix="vault") as thread:
        return thread.submit(asyncio.run, VaultReader(vault).read(origins)).result()


def _field(origin: str, name: str, data: Mapping[str, Any] | str) -> Reference:
    match data if isinstance(data, str) else data.get(name):
        case str() as problem if isinstance(data, str):
            return Reference(origin=origin, text=None, problem=f"needs {origin}, which {problem}")
        case str() as text if text.rstrip("\r\n"):
            return Reference(origin=origin, text=text.rstrip("\r\n"))
        case None:
            problem = f"has no field {name}; write it, or correct its name"
        case _:
            problem = f"has no text in {name}; write one"
    return Reference(origin=origin, text=None, problem=f"needs {origin}, which {problem}")


class _Versioned(msgspec.Struct):
    data: dict[str, Any] | None


class _Stored(msgspec.Struct):
    data: _Versioned

    @classmethod
    def of(cls, body: bytes) -> Mapping[str, Any] | str:
        try:
            return msgspec.json.decode(body, type=cls).data.data or {}
        except (msgspec.MsgspecError, RecursionError):
            return "is not in a key-value engine of version 2; correct the path"


class _Granted(msgspec.Struct):
    client_token: str
    lease_duration: int


class _Login(msgspec.Struct):
    auth: _Granted
