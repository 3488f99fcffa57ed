"""What a source's policies do with a sample: what is kept, what is dropped and why, and everything that is wrong.  Pure.

Each field is tried by the code that the door runs, in a policy that has this field alone; so this cannot tell another story.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from gateway.config_sections import AnySource, ConstField, Policy, is_pseudonym
from gateway.forms import FormPolicies, MalformedFormError, unwrapped
from gateway.items import Items
from gateway.minimize import BYTE_ORDER_MARK, Minimized, Policies, Unmet, Unreadable

_NO_KEY = b"for samples, so that no pseudonym of the real key is shown"


class KeptValue(msgspec.Struct, frozen=True):
    """A field as it would be stored."""

    field: str
    value: object
    path: str
    kind: str


class Trial(msgspec.Struct, frozen=True):
    """What became of one event of the sample."""

    policy: str | None  # NAME/VERSION, if one matches
    type: str | None
    subject: str | None
    facility: str | None
    kept: Sequence[KeptValue]
    dropped: Mapping[str, str]  # path, and why
    wrong: Sequence[str]  # empty: it is accepted


def try_sample(source: AnySource, policies: Mapping[str, Policy], body: bytes) -> list[Trial]:
    """One for each event of `body`, a post of this source."""
    accepts = [policies[name] for name in source.accepts]
    try:
        if source.each is not None:
            match Items(source.each, wrapped_in=source.wrapped_in).of(body):
                case Unreadable(reason=reason) | Unmet(reason=reason):
                    return [_refused(reason)]
                case items:
                    return [_try(accepts, item, form=False) for item in items]
        if source.wrapped_in is not None:
            body = unwrapped(body, source.wrapped_in)
    except MalformedFormError as malformed:
        return [_refused(str(malformed))]
    return [_try(accepts, body, form=source.format == "form")]


def _refused(reason: str) -> Trial:
    return Trial(None, None, None, None, [], {}, [reason])


def _try(accepts: Sequence[Policy], body: bytes, *, form: bool) -> Trial:
    policy = next((each for each in accepts if isinstance(_minimize([_only(each)], body, form=form), Minimized)), None)
    verdict = _minimize(accepts, body, form=form)
    if policy is None:
        return Trial(None, None, None, None, [], {}, _why_none(accepts, body, verdict, form=form))
    kept, wrong = [], []
    for name, field in policy.keep.items():
        match _minimize([_only(policy, {name: field})], body, form=form):
            case Minimized(data=data) if name in data:
                value = "a pseudonym" if is_pseudonym(field) else data[name]
                path = "" if isinstance(field, ConstField) else field.from_
                kept.append(KeptValue(name, value, path, f"[{field.kind}]" if field.many else field.kind))
            case Unmet(reason=reason) | Unreadable(reason=reason):
                wrong.append(reason)
            case _:
                pass  # it is optional, and not there
    told, dropped = f"{policy.name}/{policy.version}", dict(_dropped(policy, body, form=form))
    if isinstance(verdict, Minimized):
        return Trial(told, verdict.type, verdict.subject, verdict.facility, kept, dropped, wrong)
    wrong = wrong if verdict.reason in wrong else [verdict.reason, *wrong]
    return Trial(told, None, None, None, kept, dropped, wrong)


def _minimize(accepts: Sequence[Policy], body: bytes, *, form: bool) -> Minimized | Unreadable | Unmet:
    compiled = Policies(accepts, key=_NO_KEY, texts=form)
    return FormPolicies(accepts, compiled).minimize(body) if form else compiled.minimize(body)


def _only(policy: Policy, keep: Mapping[str, Any] | None = None) -> Policy:
    """The policy with its match and these fields, and nothing else."""
    nothing = {"subject": None, "time": None, "facility": None, "dedup": None}
    return policy.model_copy(update={"keep": keep or {"it": ConstField(const=True)}, "type": "sample", **nothing})


def _why_none(
    accepts: Sequence[Policy], body: bytes, verdict: Minimized | Unreadable | Unmet, *, form: bool
) -> list[str]:
    if not isinstance(verdict, Unmet):
        return [verdict.reason] if isinstance(verdict, Unreadable) else []
    told = []
    for policy in accepts:
        for path, wanted in policy.match.items():
            alone = _only(policy).model_copy(update={"match": {path: wanted}})
            if not isinstance(_minimize([alone], body, form=form), Minimized):
                told.append(f"{policy.name} does not match: {path} is not {msgspec.json.encode(wanted).decode()}")
    return told or [verdict.reason]


def _dropped(policy: Policy, body: bytes, *, form: bool) -> Iterator[tuple[str, str]]:
    """Every leaf that is not kept, by its path; never a value."""
    kept = set(policy.paths.values())
    for path in _leaves(body, form=form):
        plain = path.replace("[]", "")
        if not any(plain == each or plain.startswith(f"{each}.") for each in kept):
            matched = plain in policy.match
            sited = policy.facility is not None and plain == policy.facility.from_
            yield path, "is matched, not kept" if matched else "finds the facility" if sited else "no policy names it"


def _leaves(body: bytes, *, form: bool) -> list[str]:
    if form:
        parts = [part.partition(b"=")[0].decode(errors="replace") for part in body.split(b"&") if part]
        return list(dict.fromkeys(parts))
    try:
        return list(dict.fromkeys(_paths_in(msgspec.json.decode(body.removeprefix(BYTE_ORDER_MARK)), "")))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []


def _paths_in(value: object, path: str) -> Iterator[str]:
    match value:
        case dict() if value:
            for name, below in value.items():
                yield from _paths_in(below, f"{path}.{name}" if path else name)
        case list() if value:
            for below in value:
                yield from _paths_in(below, f"{path}[]")
        case _:
            yield path
