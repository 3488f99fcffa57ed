"""sluicegate.yaml → frozen objects.  Every mistake is told at once, with its file, line, key and mend.

The way of a file, top down:

    load                        here: the file as a whole, section by section
    └ config_document.py        its text: YAML with the line of each value, what `env:` and `file:` lead to
    └ vault.py                  what `vault:` leads to, where there is any
    └ config_sections.py        what each section may say; config_patterns.py judges the patterns of codes
    └ config_mistakes.py        one part read as what it is meant to be, its mistakes in our words
    └ config_references.py      what the parts say about each other

Nothing else in the program reads the environment.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, Discriminator, Field
from pydantic.json_schema import SkipJsonSchema

import connectors
from connectors import Kind
from connectors.settings import NAME, Reference, Secret, Settings, did_you_mean, of_at_least, shown
from gateway import hints
from gateway.config_document import ConfigurationError, Document, KeyPath, Mistake, is_open_to_others
from gateway.config_mistakes import Reading, read_as, unknown_key
from gateway.config_references import Parts, contradictions, shared_secrets, unused
from gateway.config_schema import schema_of
from gateway.config_sections import (
    OWN_SOURCE,
    SCHEMES,
    AnySource,
    ApiKey,
    Contradiction,
    Database,
    Destination,
    Entry,
    Facility,
    Hmac,
    Jwt,
    Manners,
    Named,
    Observability,
    OdooNative,
    Policy,
    Retention,
    RetrySettings,
    Route,
    Serve,
    Source,
    StandardWebhooks,
    System,
    SystemManners,
    Table,
    TimedSecret,
    Vault,
)

__all__ = [
    "ApiKey",
    "Config",
    "ConfigurationError",
    "Destination",
    "Facility",
    "Hmac",
    "Jwt",
    "Mistake",
    "Observability",
    "OdooNative",
    "Policy",
    "Retention",
    "RetrySettings",
    "Route",
    "Secret",
    "Serve",
    "Source",
    "StandardWebhooks",
    "System",
    "TimedSecret",
    "load",
    "schema",
    "secrets_of",
    "with_secrets",
]


class Whole(Entry):
    """The keys that stand for themselves, and refer to no name."""

    serve: Serve = Serve()
    """Where and how it listens."""
    database: Database = "embedded"
    """embedded: a Postgres of its own in data/ beside this file; or postgresql://user@host/name."""
    key: Annotated[Secret, AfterValidator(of_at_least(32))] | None = None
    """The key of digests and pseudonyms; with the embedded database it may be left out: one is made once."""
    vault: Vault | None = None
    """Where secrets come from that are written as vault:PATH#FIELD."""
    observability: Observability = Observability()
    """What it tells about itself."""
    retention: Retention = Retention()
    """How long what is kept is kept."""

    def contradictions(self) -> Iterator[Contradiction]:
        for name, part in (("serve", self.serve), ("retention", self.retention)):
            for below, problem, also in part.contradictions():
                yield Contradiction((name, *below), problem, tuple((name, *key) for key in also))
        for below, problem, also in self.vault.contradictions() if self.vault else ():
            yield Contradiction(("vault", *below), problem, tuple(("vault", *key) for key in also))
        if self.database != "embedded" and self.key is None:
            problem = "is missing, but a database that others share needs one; make one with: openssl rand -base64 32"
            yield Contradiction(("key",), problem, (("database",),))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class AsRead:
    """What a configuration was made of, so that it can be made again with other secrets."""

    content: bytes
    references: Mapping[str, Reference]  # by their origins


class Config(Whole):
    """All of sluicegate.yaml."""

    facilities: Table[Facility]
    """The sites that share this gateway."""
    systems: Table[System]
    """Partners that several destinations speak to: one login, one pool."""
    sources: Table[Annotated[AnySource, Discriminator("scheme")]]
    """Who may post, and how they prove who they are."""
    policies: Table[Policy]
    """What is kept of what is posted."""
    routes: Table[Route]
    """Which events go where."""
    destinations: Table[Destination]
    """Where to, and how gently."""

    gone: SkipJsonSchema[tuple[str, ...]] = ()  # destinations that are retired and without a connector
    path: SkipJsonSchema[Path]
    digest: SkipJsonSchema[str]  # of the file: SHA-256, in hex
    as_read: SkipJsonSchema[AsRead] = Field(repr=False, exclude=True)
    warnings: SkipJsonSchema[tuple[str, ...]] = ()  # what is no mistake, but perhaps not meant

    @property
    def folder(self) -> Path:
        """Where the file lies; all that is written goes into `data` in it."""
        return self.path.absolute().parent


def load(
    path: Path, environ: Mapping[str, str], kinds: Mapping[str, Kind] | None = None, *, last: Config | None = None
) -> Config:
    """Reads the configuration; raises a ConfigurationError that holds every mistake.

    `kinds` are the kinds of destination that there are, by default all that are installed.  What a vault cannot tell now
    is as it was in `last`.  It may wait for that vault: within an event loop, call it in a thread.
    """
    document = Document(path, environ)
    if document.vaulted:
        known = _from_the_vault(document, last.as_read.references if last else {})
        document = Document(path, environ, content=document.content, known=known)
    return _File(document, connectors.kinds() if kinds is None else kinds).config(path)


def _from_the_vault(document: Document, last: Mapping[str, Reference]) -> Mapping[str, Reference]:
    given = document.values.get("vault") if isinstance(document.values, dict) else None
    if given is None:
        return {}
    vault = read_as(Vault, given).whole
    if vault is None or any(vault.contradictions()):
        problem = "comes from a vault, and what `vault` says of it is wrong; correct that first"
        return {origin: Reference(origin=origin, text=None, problem=problem) for origin in document.vaulted}
    from gateway.vault import fetch  # noqa: PLC0415 — whoever has no vault need not wait for what speaks to one

    found = fetch(vault, document.vaulted)
    return {origin: reference if reference.text else last.get(origin, reference) for origin, reference in found.items()}


def with_secrets(config: Config, renewed: Mapping[str, Reference], kinds: Mapping[str, Kind] | None = None) -> Config:
    """The same configuration, where `renewed` are what some of its origins lead to by now; nothing else is read anew."""
    known = {**config.as_read.references, **renewed}
    document = Document(config.path, {}, content=config.as_read.content, known=known)
    return _File(document, connectors.kinds() if kinds is None else kinds).config(config.path)


def secrets_of(config: Config) -> Mapping[str, Secret]:
    """Its secrets, by where they come from."""
    return {secret.origin: secret for _, secret in _secrets_in(config, ()) if secret.origin}


def load_policies(path: Path, environ: Mapping[str, str]) -> Mapping[str, Policy]:
    """The policies of a file alone, whatever the rest of it is; raises a ConfigurationError with their mistakes."""
    return _File(Document(path, environ), {}).policies()


def schema(kinds: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """The JSON Schema (2020-12) of sluicegate.yaml, for editors."""
    return schema_of(Config, Destination, System, connectors.kinds() if kinds is None else kinds)


S = TypeVar("S", bound=Settings)
N = TypeVar("N", bound=Named)

_TABLES: Final = ("facilities", "systems", "sources", "policies", "routes", "destinations")
_ASKED_OF_SERVE: Final = (("serve", "listen"), ("serve", "trusted_proxies"), ("serve", "public_url"))
Entries = Iterator[tuple[str, KeyPath, object]]


class _File:
    """One document on its way to a Config; collects the mistakes of all its sections."""

    def __init__(self, document: Document, kinds: Mapping[str, Kind]) -> None:
        self._document = document
        self._kinds = kinds
        self._kind_names = tuple(kinds)  # a look into `kinds` itself imports what is found
        self._mistakes = list(document.mistakes)
        self._values = self._sections()

    def policies(self) -> Mapping[str, Policy]:
        policies = {name: self._named(Policy, name, at, given) for name, at, given in self._entries("policies")}
        if self._mistakes:
            raise ConfigurationError(self._mistakes)
        return _complete(policies)

    def config(self, path: Path) -> Config:
        alone = {key: value for key, value in self._values.items() if key not in _TABLES}
        whole = self._read(Whole, (), alone, also_known=_TABLES)
        facilities = {name: self._read(Facility, at, given) for name, at, given in self._entries("facilities")}
        systems = {name: self._system(name, at, given) for name, at, given in self._entries("systems")}
        sources = {name: self._source(name, at, given) for name, at, given in self._entries("sources")}
        policies = {name: self._named(Policy, name, at, given) for name, at, given in self._entries("policies")}
        routes = {name: self._named(Route, name, at, given) for name, at, given in self._entries("routes")}
        destinations = {name: self._destination(name, at, given) for name, at, given in self._entries("destinations")}
        parts = Parts(
            unreadable=frozenset(name for name in _TABLES if not isinstance(self._values.get(name, {}), dict)),
            serve=whole.right.serve if whole.right and not any(map(whole.hides, _ASKED_OF_SERVE)) else None,
            facilities=tuple(facilities),
            systems={name: _word(given, "connector") for name, _, given in self._entries("systems")},
            sources=sources,
            policies=policies,
            routes=routes,
            destinations={name: manners for name, (manners, _) in destinations.items()},
        )
        for key, problem, _ in contradictions(parts):
            self._tell(key, problem)
        if self._mistakes or whole.whole is None:
            raise ConfigurationError(self._mistakes)
        config = Config(
            **dict(whole.whole),
            facilities=_complete(facilities),
            systems={name: system for name, system in systems.items() if system is not None},
            sources=_complete(sources),
            policies=_complete(policies),
            routes=_complete(routes),
            destinations={name: built for name, (_, built) in destinations.items() if built is not None}
            | hints.destinations(_complete(sources)),
            gone=tuple(name for name, (_, built) in destinations.items() if built is None),
            path=path,
            digest=self._document.digest,
            as_read=AsRead(content=self._document.content, references=self._document.references),
        )
        return config.model_copy(update={"warnings": tuple(self._warnings(config, parts))})

    def _sections(self) -> dict[str, Any]:
        """What the file has at its top; what stands empty there is not given."""
        values = self._document.values
        if not isinstance(values, dict | None):
            self._tell((), "the file is no mapping; write serve:, sources:, policies:, routes: and destinations:")
        return {key: value for key, value in (values if isinstance(values, dict) else {}).items() if value is not None}

    def _entries(self, section: str) -> Entries:
        table = self._values.get(section, {})
        if not isinstance(table, dict):
            self._tell((section,), f"is {shown(table)}, but must be a mapping of names; write each under its name")
            return
        for name, given in table.items():
            if not isinstance(name, str) or not re.fullmatch(NAME, name):
                problem = "is no name; use up to 63 of a-z, 0-9 and -, beginning with a letter or digit"
                self._tell((section, name), problem)
            yield str(name), (section, name), given

    def _read(self, model: type[S], at: KeyPath, given: object, *, also_known: tuple[str, ...] = ()) -> Reading[S]:
        reading = read_as(model, given, also_known=also_known)
        for wrong in reading.wrong:
            self._tell((*at, *wrong.path), wrong.problem)
        if isinstance(reading.right, Entry):
            for key, problem, also in reading.right.contradictions():
                if not any(map(reading.hides, (key, *also))):
                    self._tell((*at, *key), problem)
        return reading

    def _named(self, model: type[N], name: str, at: KeyPath, given: object) -> Reading[N]:
        """An entry that knows its name, which is the key that it stands under."""
        if not isinstance(given, dict):
            return self._read(model, at, given)
        if "name" in given:
            self._tell((*at, "name"), unknown_key("name", model.key_names()))
        return self._read(model, at, {**given, "name": name})

    def _source(self, name: str, at: KeyPath, given: object) -> Reading[AnySource]:
        if name == OWN_SOURCE:
            self._tell(at, "is called as what the program itself says comes from; give it another name")
        scheme = _word(given, "scheme")
        if scheme is not None and scheme in SCHEMES:
            model: type[Any] = SCHEMES[scheme]
            return self._named(model, name, at, given)
        if scheme is not None:
            problem = f'is "{scheme}", but must be one of {", ".join(SCHEMES)}{did_you_mean(scheme, tuple(SCHEMES), among=False)}'
        else:
            problem = f"is missing; without proof nothing comes in: write one of {', '.join(SCHEMES)}"
        self._tell((*at, "scheme"), problem)
        return Reading(None, None)

    def _system(self, name: str, at: KeyPath, given: object) -> System | None:
        if not isinstance(given, dict):
            self._read(SystemManners, at, given)
            return None
        connector = _word(given, "connector")
        common, own = _split(given, SystemManners, "connector")
        manners = self._read(SystemManners, at, common)
        kind = self._kind((*at, "connector"), connector)
        if kind is None or connector is None:
            return None
        if kind.system is None:
            self._tell(
                (*at, "connector"), f'names "{connector}", which needs no system; put its keys into the destination'
            )
            return None
        settings = self._read(kind.system, at, own, also_known=("connector", *SystemManners.key_names()))
        if manners.whole is None or settings.whole is None:
            return None
        return System(name=name, connector=connector, settings=settings.whole, **dict(manners.whole))

    def _destination(self, name: str, at: KeyPath, given: object) -> tuple[Reading[Manners], Destination | None]:
        if not isinstance(given, dict):
            return self._read(Manners, at, given), None
        common, own = _split(given, Manners, "connector", "system")
        manners = self._read(Manners, at, common)
        if manners.right is not None and manners.right.retired and not {"connector", "system"} & given.keys():
            for key in given.keys() - {"retired"}:
                self._tell((*at, key), "stands beside retired without a connector; add its connector, or leave it out")
            return manners, None
        system, connector = _word(given, "system"), self._connector(at, given)
        kind = self._kind((*at, "system" if system else "connector"), connector) if connector else None
        if kind is None or connector is None:
            return manners, None
        if system is not None and kind.system is None:
            return manners, None  # is told where the system is
        if system is None and kind.system is not None:
            problem = f'names "{connector}", which is reached through a system; declare one in systems, and write system: NAME'
            self._tell((*at, "connector"), problem)
        settings = self._read(kind.settings, at, own, also_known=("connector", "system", *Manners.key_names()))
        if manners.right is not None and manners.right.reads is not None and not kind.hands_on:
            problem = f"is given, but {connector} hands nothing on; leave it out, or use another kind of destination"
            self._tell((*at, "reads"), problem)
        if manners.whole is None or settings.whole is None:
            return manners, None
        return manners, Destination(
            name=name, connector=connector, system=system, settings=settings.whole, **dict(manners.whole)
        )

    def _connector(self, at: KeyPath, given: Mapping[str, object]) -> str | None:
        """The kind of a destination, which may be that of its system."""
        system, connector = _word(given, "system"), _word(given, "connector")
        if system is None:
            if connector is None:
                self._tell(at, f"needs a connector, or a system; write one of {', '.join(self._kind_names)}")
            return connector
        if connector is not None:
            self._tell((*at, "connector"), "is given beside system, which says it already; leave it out")
        systems = self._values.get("systems", {})
        if not isinstance(systems, dict):
            return None
        if system not in systems:
            problem = f'names "{system}", but there is no such system{did_you_mean(system, tuple(systems))}'
            self._tell((*at, "system"), problem)
            return None
        connector = _word(systems[system], "connector")
        return connector if connector in self._kind_names else None

    def _kind(self, at: KeyPath, connector: str | None) -> Kind | None:
        if connector is None:
            self._tell(at, f"is missing; write one of {', '.join(self._kind_names)}")
            return None
        if connector not in self._kind_names:
            self._tell(at, f'names "{connector}", but there is no such kind{did_you_mean(connector, self._kind_names)}')
            return None
        try:
            return self._kinds[connector]
        except (ImportError, AttributeError, TypeError) as error:
            self._tell(at, f'names "{connector}", whose package is broken: {error}; install it anew')
            return None

    def _tell(self, at: KeyPath, problem: str) -> None:
        """What came by `env:` or `file:` is never repeated."""
        for reference in sorted(self._document.references.values(), key=lambda one: len(one.text or ""), reverse=True):
            if reference.text and len(reference.text) >= 8:
                for form in (shown(reference.text), reference.text):
                    problem = problem.replace(form, f"what {reference.origin} holds")
        names_an_item = problem.startswith("names ") and at and type(at[-1]) is int
        self._mistakes.append(self._document.mistake(at, problem, key=at[:-1] if names_an_item else at))

    def _warnings(self, config: Config, parts: Parts) -> Iterator[str]:
        for at, secret in _secrets_in(config, ()):
            if secret.origin.startswith("file:"):
                path = self._document.folder / secret.origin.removeprefix("file:")
                if is_open_to_others(path):
                    yield self._warning(
                        at, f"comes from {path.name}, which others on this machine may read or change; chmod 600 it"
                    )
        for name, source in config.sources.items():
            match source:
                case Hmac(algorithm="sha1"):
                    yield self._warning(
                        ("sources", name, "algorithm"), "is sha1, which is weak; prefer sha256 if the sender can"
                    )
                case Jwt(body_hash=None):
                    yield self._warning(
                        ("sources", name), "has no body_hash, so that a token proves who posts, but not what"
                    )
                case _:
                    pass
        for place, problem in shared_secrets(config.sources):
            yield self._warning(place, problem)
        for name, source in config.sources.items():
            for index, accepted in enumerate(source.accepts if source.each else ()):
                if config.policies[accepted].dedup is None:
                    yield self._warning(
                        ("sources", name, "accepts", index),
                        f'has each and takes "{accepted}", which has no dedup, so that events that are alike byte by byte '
                        "are one, whenever they come; say in the policy what tells them apart",
                    )
        for at, problem in unused(parts):
            yield self._warning(at, problem)

    def _warning(self, at: KeyPath, problem: str) -> str:
        return str(self._document.mistake(at, problem))


def _word(given: object, key: str) -> str | None:
    """A word that decides how the rest is read; it may come from the environment, too."""
    value = given.get(key) if isinstance(given, dict) else None
    if isinstance(value, Reference):
        return value.text
    return str(value) if isinstance(value, str | int | float) else None


def _split(
    given: Mapping[str, object], common: type[Settings], *read: str
) -> tuple[dict[str, object], dict[str, object]]:
    """What `common` has of the keys, and the rest without those that are `read` already."""
    names = common.key_names()
    return (
        {key: value for key, value in given.items() if key in names},
        {key: value for key, value in given.items() if key not in names and key not in read},
    )


def _complete(readings: Mapping[str, Reading[S]]) -> dict[str, S]:
    return {name: reading.whole for name, reading in readings.items() if reading.whole is not None}


def _secrets_in(value: object, at: KeyPath) -> Iterator[tuple[KeyPath, Secret]]:
    match value:
        case Secret():
            yield at, value
        case Settings():
            for name, field in type(value).model_fields.items():
                below = at if name == "settings" else (*at, field.alias or name)
                yield from _secrets_in(getattr(value, name), below)
        case Mapping():
            for key, item in value.items():
                yield from _secrets_in(item, (*at, key))
        case tuple():
            for index, item in enumerate(value):
                yield from _secrets_in(item, (*at, index))
        case _:
            pass
