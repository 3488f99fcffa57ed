"""The JSON Schema of sluicegate.yaml: what an editor proposes and underlines while somebody writes it."""

import ast
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cache
from inspect import cleandoc, getsource
from itertools import pairwise
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from connectors import Kind
from connectors.settings import NAME, Settings, written, written_size
from gateway.config_sections import Listen

REFERENCE = {"type": "string", "pattern": "^(env|file|vault):"}


def schema_of(
    config: type[Settings], destination: type[Settings], system: type[Settings], kinds: Mapping[str, Kind]
) -> dict[str, Any]:
    """`config`, with the keys of each kind of destination and system as alternatives by `connector`."""
    whole = config.model_json_schema(schema_generator=_Schema)
    definitions = whole["$defs"]
    tables = whole["properties"]
    for table in tables.values():
        if table.get("type") == "object" and "additionalProperties" in table:
            table["propertyNames"] = {"pattern": f"^{NAME}$"}
    tables["systems"]["additionalProperties"] = _alternatives(
        [_of_kind(system, kind.name, kind.system, definitions) for kind in kinds.values() if kind.system]
    )
    tables["destinations"]["additionalProperties"] = _alternatives(
        [
            _of_system(destination, kind, definitions)
            if kind.system
            else _of_kind(destination, kind.name, kind.settings, definitions)
            for kind in kinds.values()
        ]
        + [
            {
                "type": "object",
                "properties": {"retired": {"const": True, "description": "Its system is gone: what it owes is held."}},
                "required": ["retired"],
                "additionalProperties": False,
            }
        ]
    )
    for unneeded in (destination.__name__, system.__name__):
        definitions.pop(unneeded, None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sluicegate.yaml",
        **{key: value for key, value in whole.items() if key not in {"required", "title"}},
    }


def _alternatives(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return {"anyOf": schemas} if schemas else {"not": {}}


def _of_kind(
    common: type[Settings], name: str, settings: type[Settings], definitions: dict[str, Any]
) -> dict[str, Any]:
    one = _merged(common, settings, definitions)
    one["properties"]["connector"] |= {"const": name}
    one["properties"].pop("system", None)
    return one


def _of_system(common: type[Settings], kind: Kind, definitions: dict[str, Any]) -> dict[str, Any]:
    one = _merged(common, kind.settings, definitions)
    del one["properties"]["connector"]
    one["required"] = ["system", *(key for key in one["required"] if key != "connector")]
    return one


def _merged(common: type[Settings], settings: type[Settings], definitions: dict[str, Any]) -> dict[str, Any]:
    parts = [model.model_json_schema(schema_generator=_Schema) for model in (settings, common)]
    for part in parts:
        definitions |= part.get("$defs", {})
    return {
        "type": "object",
        "properties": {key: value for part in parts for key, value in part["properties"].items()},
        "required": sorted({key for part in parts for key in part.get("required", ())} - {"settings", "name"}),
        "additionalProperties": False,
    }


class _Schema(GenerateJsonSchema):
    """Writes values as the file does, and lets each come by `env:` or `file:`."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        described = super().model_schema(schema)
        for key, text in _descriptions(schema["cls"]):
            described["properties"].get(key, {}).setdefault("description", text)
        return described

    def int_schema(self, schema: core_schema.IntSchema) -> JsonSchemaValue:
        return {"anyOf": [super().int_schema(schema), REFERENCE]}

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), REFERENCE]}

    def bool_schema(self, schema: core_schema.BoolSchema) -> JsonSchemaValue:
        return {"anyOf": [super().bool_schema(schema), REFERENCE]}

    def str_schema(self, schema: core_schema.StringSchema) -> JsonSchemaValue:
        text = super().str_schema(schema)
        return {"anyOf": [text, REFERENCE]} if "pattern" in text else text

    def literal_schema(self, schema: core_schema.LiteralSchema) -> JsonSchemaValue:
        words = super().literal_schema(schema)
        return words if len(schema["expected"]) == 1 else {"anyOf": [words, REFERENCE]}

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        """None is what an optional key is when it is not given; nobody writes it."""
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        described = super().default_schema(schema)
        if described.get("default", "") is None:
            del described["default"]
        if isinstance(described.get("default"), int) and described.get("type") == "string":
            described["default"] = written_size(described["default"])
        return described

    def encode_default(self, dft: object) -> Any:
        match dft:
            case timedelta():
                return written(dft)
            case Settings():
                return {}
            case Mapping():
                return dict(dft)
            case tuple():
                return [self.encode_default(each) for each in dft]
            case Listen():
                return str(dft)
            case _:
                return super().encode_default(dft)

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 — the key says it
        return False


def _descriptions(model: type[Any]) -> Iterator[tuple[str, str]]:
    """The docstrings below its keys.  Read from the source here, and not when the class is made: only an editor asks."""
    for part in model.__mro__:
        if issubclass(part, Settings):
            for (owner, name), text in _docstrings(part.__module__).items():
                if owner == part.__name__ and name in model.model_fields:
                    yield model.model_fields[name].alias or name, text


@cache
def _docstrings(module: str) -> Mapping[tuple[str, str], str]:
    """Of all keys in a module, by class and name."""
    classes = [node for node in ast.walk(ast.parse(getsource(sys.modules[module]))) if isinstance(node, ast.ClassDef)]
    found = {}
    for owner in classes:
        for statement, below in pairwise(owner.body):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[owner.name, name] = cleandoc(text)
                case _:
                    pass
    return found
