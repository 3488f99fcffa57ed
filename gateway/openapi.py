"""The API described in OpenAPI 3.1, from the same declarations that serve it."""

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Protocol

import msgspec

from gateway.permissions import RIGHTS, Permission


class Declared(Protocol):
    """What a route says of itself."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def does(self) -> str: ...
    @property
    def permission(self) -> Permission | None: ...
    @property
    def query(self) -> type: ...
    @property
    def body(self) -> type | None: ...
    @property
    def conflicts(self) -> bool: ...
    @property
    def answers(self) -> Mapping[int, Any]: ...


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong (RFC 9457); never a word of what was sent."""

    type: str
    title: str
    status: int
    detail: str


def describe(routes: Iterable[Declared], *, version: str) -> dict[str, Any]:
    """The whole document."""
    declared = list(routes)
    kinds = [Problem, *(kind for route in declared for kind in (route.body, *route.answers.values()) if kind)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema = dict(zip(map(str, kinds), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in declared:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sluicegate, the operators' API",
            "version": version,
            "description": "Lists answer `items` and `next`: give `next` back as `cursor` until it is null.",
        },
        "servers": [{"url": "/api/v1"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "Made by `sluicegate token create`."}
            },
        },
    }


def _operation(route: Declared, schema: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.does,
        "parameters": [*_places(route.path), *_parameters(route.query)],
        "responses": {
            **{
                str(status): _answer(HTTPStatus(status), "application/json", schema[str(kind)])
                for status, kind in route.answers.items()
            },
            **{
                str(status.value): _answer(status, "application/problem+json", schema[str(Problem)])
                for status in _troubles(route)
            },
        },
    }
    if route.permission is None:
        operation["security"] = []
    else:
        able = ", ".join(role for role in RIGHTS if route.permission in RIGHTS[role])
        operation["security"] = [{"token": []}]
        operation["description"] = f"Needs the permission `{route.permission}`, which these roles have: {able}."
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema[str(route.body)]}},
        }
    return operation


def _troubles(route: Declared) -> list[HTTPStatus]:
    """The errors that this route can answer with, on top of trouble of ours."""
    troubles = [HTTPStatus.BAD_REQUEST, HTTPStatus.SERVICE_UNAVAILABLE]
    if route.permission is not None:
        troubles += [HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN]
    if "{" in route.path:
        troubles.append(HTTPStatus.NOT_FOUND)
    if route.conflicts:
        troubles.append(HTTPStatus.CONFLICT)
    if route.body is not None:
        troubles += [
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            HTTPStatus.UNPROCESSABLE_ENTITY,
        ]
    return sorted(troubles)


def _answer(status: HTTPStatus, media: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": status.phrase, "content": {media: {"schema": schema}}}


def _places(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", path)
    ]


def _parameters(query: type) -> list[dict[str, Any]]:
    return [
        {"name": field.encode_name, "in": "query", "required": False, "schema": msgspec.json.schema(field.type)}
        for field in msgspec.structs.fields(query)
    ]
