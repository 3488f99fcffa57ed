"""What Odoo's own webhook says is a hint: which record it was is believed, and what is kept of it is read again.

    POST ──> hint (model, id) ──202──> a delivery to `reread-SOURCE` ──> Odoo: read ──> policy ──> event ──> routes

A hint is an event that is owed to a destination which the program makes for its source.  So it is on disk before the
202, is tried again while Odoo is away, and is a dead letter in the end, as all that is delivered.  What was read is
kept by the source's policies, and told once: a hint that is read twice finds the event there, by the policy's `dedup`.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Final
from uuid import uuid4

import msgspec

from connectors.settings import Settings
from gateway.config_sections import AnySource, Destination, OdooNative, Policy
from gateway.duplicate_keys import DuplicateKeys, Level, members_of
from gateway.minimize import Minimized, Unmet, Unreadable

CONNECTOR: Final = "reread"
TYPE: Final = "sluicegate.hint"
POLICY: Final = "sluicegate"
MODEL, ID = "_model", "_id"


def name_of(source: str) -> str:
    """The destination that a source's hints are owed to."""
    return f"{CONNECTOR}-{source}"


def destinations(sources: Mapping[str, AnySource]) -> dict[str, Destination]:
    """One for each source whose posts are hints."""
    return {
        name_of(name): Destination(
            name=name_of(name), connector=CONNECTOR, system=source.reread, settings=Settings(), concurrency=4
        )
        for name, source in sources.items()
        if isinstance(source, OdooNative) and source.reread is not None
    }


def fields_by_model(policies: Iterable[Policy]) -> dict[str, tuple[str, ...]]:
    """What has to be read of each model, so that its policies find what they keep."""
    found: dict[str, dict[str, None]] = {}
    for policy in policies:
        model = policy.match[MODEL]
        paths = [*policy.match, *policy.paths.values()]
        paths += [policy.facility.from_] if policy.facility else []
        found.setdefault(str(model), {}).update(dict.fromkeys(path for path in paths if path not in {MODEL, ID}))
    return {model: tuple(fields) for model, fields in found.items()}


class Hint(Minimized, frozen=True):
    """What is kept of a post that is a hint."""

    @property
    def same(self) -> str:
        """No two hints are one: the same words may come of two changes."""
        return uuid4().hex


class _Posted(msgspec.Struct, frozen=True, gc=False):
    model: str = msgspec.field(name=MODEL)
    id: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] = msgspec.field(name=ID)


class Hints:
    """Takes model and id out of a post, and nothing else; stands where other sources have their policies."""

    def __init__(self, models: Iterable[str]) -> None:
        self._models = frozenset(models)
        self._decode = msgspec.json.Decoder(_Posted).decode
        self._duplicates = DuplicateKeys(Level.of({(MODEL,), (ID,)}))

    def minimize(self, body: bytes) -> Minimized | Unreadable | Unmet:
        try:
            body.decode()
            posted = self._decode(body)
        except msgspec.ValidationError:
            return Unmet(f"{MODEL} and {ID} must name a record of Odoo")
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Unreadable("the body is not a JSON object")
        except RecursionError:
            return Unreadable("the body is nested too deeply")
        if twice := self._duplicates.find(body, members_of(body)):
            return Unreadable(f"{twice} stands twice in the body")
        if posted.model not in self._models:
            return Unmet("no policy of this source matches")
        data = {"model": posted.model, "id": posted.id}
        return Hint(
            policy=POLICY,
            version=1,
            type=TYPE,
            subject=f"{posted.model}/{posted.id}",
            facility=None,
            time=None,
            data=dict(data),
            document=msgspec.json.encode(data).decode(),
            dedup=(),
            dropped=(),
        )
