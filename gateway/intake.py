"""The way of one request: authenticate → minimize → route → outbox.add → 202."""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from hashlib import blake2b
from ipaddress import ip_address
from math import ceil
from typing import ParamSpec
from uuid import UUID

import structlog
from aiohttp import HttpVersion11, web

from gateway.admission import AddressLimits
from gateway.authenticate import Caller, Presented, Reason, Scheme, Unauthorized, scheme_for
from gateway.authenticate.peer import Address, client_address, is_within
from gateway.authenticate.presented import HasIssuer
from gateway.config import Config
from gateway.config_sections import AnySource, ClientCert, HttpSignature, OdooNative, Serve
from gateway.diagnosis import Diagnosis
from gateway.forms import FormPolicies, WrappedPolicies
from gateway.handshake import LONGEST, Handshake, MalformedError
from gateway.hints import Hints, fields_by_model, name_of
from gateway.items import MOST_ITEMS, Items
from gateway.listening import Brief, Incoming, Post, on_unix_socket
from gateway.minimize import Minimized, Policies, Unmet, Unreadable
from gateway.parties import Party, parties
from gateway.problems import problem, unavailable
from gateway.refusals import Refusals
from gateway.request_body import Unacceptable, judge_head, media_of, read_body, within
from gateway.routes import Owed, Routes
from gateway.secrets_used import SecretsUsed
from gateway.silence import Heard
from gateway.slow_refusals import SlowRefusals
from gateway.token_bucket import TokenBucket
from observability.failpoints import failpoint
from observability.logs import log_sparingly
from observability.metrics import Metrics, SourceMetrics
from observability.names import LogEvent
from observability.tracing import Accepted, Tracing
from outbox.clock import DatabaseClock, Identities
from outbox.database import Unavailable
from outbox.event import Delivered, Duplicate, Event, Outcome, Refused, Retry
from outbox.identity import uuid_of
from outbox.intake_batch import IntakeBatch
from outbox.store import Arrival, Debt, Destination, Seen, Stored

log = structlog.get_logger()

P = ParamSpec("P")

UNTOLD = 0.1  # seconds in which what is counted of requests is not told to the metrics, unless they are asked for
_NO_OBJECT = Unmet("it must be an object")
_AT_ONCE = 50  # events of one post, before others have their turn
PURPOSES = (b"body", b"id", b"same", b"same body", b"same signed")  # of digests: none is ever taken for one of another


class Refusal(Exception):  # noqa: N818  an answer, not a mistake
    """Whatever was sent is not taken; `code` for metrics and logs, `answer` for the caller."""

    def __init__(self, code: str, answer: web.Response, digest: UUID | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.answer = answer
        self.digest = digest


class Intake:
    """The door at POST /hooks/{source}."""

    def __init__(
        self,
        *,
        batch: IntakeBatch,
        clock: DatabaseClock,
        metrics: Metrics,
        tracing: Tracing,
        refusals: Refusals,
        heard: Heard,
        secrets_used: SecretsUsed,
        diagnosis: Diagnosis,
        key: bytes,
        share: int = 1,
    ) -> None:
        """`key` is that of digests and pseudonyms; a rate limit is shared by `share` processes."""
        self._batch = batch
        self._clock = clock
        self._identities = Identities(clock.seconds)
        self._metrics = metrics
        self._tracing = tracing
        self._refusals = refusals
        self._heard = heard
        self._secrets_used = secrets_used
        self._diagnosis = diagnosis
        self._key = key
        self._keyed = {purpose: blake2b(key=key, person=purpose, digest_size=16) for purpose in PURPOSES}
        self._share = share
        self._sources: Mapping[str, _Door] = {}
        self._routes = Routes({})
        self._destinations: Mapping[str, Destination] = {}
        self._serve = Serve()
        self._parties: Mapping[str, Mapping[Party, int]] = {}
        self._by_address: AddressLimits | None = None
        self._slowly = SlowRefusals()
        self._telling: asyncio.TimerHandle | None = None

    async def adopt(self, config: Config, destinations: Mapping[str, Destination]) -> None:
        """From now on this configuration; requests that are under way end by the one that they began with."""
        self.tell()
        before = self._sources
        self._sources = {
            name: _Door(
                source,
                config,
                # those of before, where there are: what is under way counts there, too
                before[name].counts if name in before else SourceMetrics(self._metrics, name),
                self._scheme(source, config),
                key=self._key,
                share=self._share,
            )
            for name, source in config.sources.items()
        }
        self._routes = Routes(config.routes, give_up={name: d.retry.give_up for name, d in config.destinations.items()})
        self._destinations = destinations
        self._parties = parties(config)
        if (limit := config.serve.limit_per_address) is None:
            self._by_address = None
        elif self._by_address is None or self._serve.limit_per_address != limit:
            self._by_address = AddressLimits(per_second=limit.per_second / self._share)
        self._serve = config.serve
        kept = {door.scheme for door in self._sources.values()}
        for door in before.values():
            if door.scheme not in kept:
                await door.scheme.close()

    def _scheme(self, source: AnySource, config: Config) -> Scheme:
        """That of before, if nothing of it has changed: the keys of an issuer that does not answer now go on counting."""
        before = self._sources.get(source.name)
        if before is not None and before.source == source and self._serve == config.serve:
            return before.scheme
        return scheme_for(source, config.serve)

    def tell(self) -> None:
        """What was counted since the last time, to the metrics."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        for name, door in self._sources.items():
            for place in door.counts.used:
                if place < len(door.proofs):
                    self._secrets_used.note(name, door.proofs[place].origin, self._clock.now())
            door.counts.tell()

    def issuers(self) -> Mapping[str, bool]:
        """Of each source that has an issuer: whether that does not tell its keys."""
        schemes = {name: door.scheme for name, door in self._sources.items()}
        return {name: scheme.lacks_keys for name, scheme in schemes.items() if isinstance(scheme, HasIssuer)}

    def _tell_soon(self) -> None:
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(UNTOLD, self.tell)

    async def close(self) -> None:
        self.tell()
        for door in self._sources.values():
            await door.scheme.close()

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """As the application's router finds it."""
        return await self.take(request, request.match_info["source"], request.match_info.get("token"))

    async def take(self, request: Incoming, name: str, token: str | None) -> web.StreamResponse:
        """One post, answered: 202 when it is durable, 200 when it was there, a problem otherwise."""
        began = time.monotonic()
        if self._by_address is not None and (limit := self._by_address.exceeded(self._peer(request), began)):
            self._refusals.refused("", "address_rate_limited")
            _forget_body(request)
            await self._slowly.before("")
            return _too_many(limit)
        door = self._sources.get(name)
        if door is None or (token is not None and not door.takes_token):
            self._refusals.refused("", "unknown_source")
            _forget_body(request)
            await self._slowly.before("")
            return problem(404, "Unknown source", "There is no source of this name.")
        with self._tracing.accept(name, request.headers.get("traceparent"), trust=door.source.trust_trace) as span:
            answer: web.StreamResponse
            try:
                answer = await self._take(request, door, token, span)
            except Refusal as refusal:
                answer = refusal.answer
                span.refused(refusal.code, answer.status)
                self._refusals.refused(name, refusal.code, refusal.digest)
                log_sparingly(
                    LogEvent.REQUEST_REFUSED, level="info", source=name, reason=refusal.code, status=answer.status
                )
            except Unavailable:
                answer = unavailable()
                span.refused("unavailable", answer.status)
                log_sparingly(LogEvent.POSTGRES_AWAY, part="intake")
            span.answered(answer.status)
        door.counts.seconds.append(time.monotonic() - began)
        self._tell_soon()
        if 400 <= answer.status < 500:
            _forget_body(request)
            await self._slowly.before(name)
        return answer

    async def _take(self, request: Incoming, door: "_Door", token: str | None, span: Accepted) -> web.StreamResponse:
        if door.limit is not None and door.limit.is_empty(time.monotonic()):
            if _is_elsewhere(self._peer(request), door.source):
                raise Refusal(
                    "wrong_address", _not_proven()
                )  # how busy a source is, is not told to whom it does not know
            raise Refusal("rate_limited", _too_many(door.limit))  # whoever it is, so nobody's proof need be looked at
        asked = door.handshake
        if (
            asked is not None
            and isinstance(request, web.Request)  # a plain post has no query
            and not _is_elsewhere(self._peer(request), door.source)
            and (greeting := self._greet(door, asked, asked.first, request.query)) is not None
        ):
            return greeting
        body = await self._read(request, door)
        failpoint("intake.read")
        caller = await self._authenticate(request, door, token, body)
        failpoint("intake.authenticated")
        if asked and (greeting := self._greet(door, asked, asked.answer, body, caller.secret)) is not None:
            return greeting
        self._limit(door)
        digest = self._digest(b"body", body)
        if door.items is not None:
            return await self._take_each(door, door.items, body, digest, span)
        minimized = self._minimize(door, body, digest)
        self._limit_facility(door, minimized.facility)
        del body  # while the event waits for the database, what is not kept of it takes no memory
        failpoint("intake.minimized")
        identity = self._identities.next()
        with span.produce(identity, minimized.type) as traceparent:
            event = self._event(identity, door.source.name, minimized, traceparent)
            same = self._same(event, minimized, caller, digest)
            debts = self._debts(event) if door.rereads is None else self._owed((door.rereads,), event)
            answer = await self._batch.add(
                Arrival(event=event, data=minimized.document, same=same, digest=digest, debts=debts)
            )
        self._heard.note(event.source, event.facility, event.received_at)
        failpoint("intake.before_answer")
        if minimized.dropped:
            door.counts.dropped[minimized.policy] += len(minimized.dropped)
            self._refusals.dropped(door.source.name, minimized.policy, minimized.dropped)
        if isinstance(answer, Seen):
            if caller.signed_id is not None and answer.digest not in {digest, None}:
                again = problem(409, "Same id, other body", "This id was used for another body; the first one stands.")
                raise Refusal("same_id_other_body", again, digest)
            span.duplicate_of(answer.event)
            door.counts.duplicates += 1
            return _answer(200, answer.event, duplicate=True)
        door.counts.accepted += 1
        if not debts:
            self._unrouted(event)
        return _answer(202, event.id, duplicate=False)

    async def _take_each(self, door: "_Door", items: Items, body: bytes, digest: UUID, span: Accepted) -> Brief:
        """Several events in one post: stored together or not at all, each with a dedup key of its own.

        The id that the sender signed is that of the post, so it tells no event from another; and the same event may come
        again in another post.  So each is known by what its policy says, else by its own bytes.
        """
        taken, told = await self._minimize_each(door, items, body, digest)
        for facility in {minimized.facility for minimized, _ in taken.values()}:
            self._limit_facility(door, facility)
        del body
        with ExitStack() as sending:
            arrivals = []
            for minimized, itself in taken.values():
                identity = self._identities.next()
                traceparent = sending.enter_context(span.produce(identity, minimized.type))
                event = self._event(identity, door.source.name, minimized, traceparent)
                same, debts = self._same(event, minimized, None, itself), self._debts(event)
                arrivals.append(Arrival(event=event, data=minimized.document, same=same, digest=itself, debts=debts))
            answers = await self._batch.add_together(arrivals)
        for place, (minimized, _), arrival, answer in zip(taken, taken.values(), arrivals, answers, strict=True):
            event, is_new = arrival.event, isinstance(answer, Stored)
            self._heard.note(event.source, event.facility, event.received_at)
            if minimized.dropped:
                door.counts.dropped[minimized.policy] += len(minimized.dropped)
                self._refusals.dropped(door.source.name, minimized.policy, minimized.dropped)
            told[place] = {"id": str(answer.event), "duplicate": not is_new}
            if is_new:
                door.counts.accepted += 1
                if not arrival.debts:
                    self._unrouted(event)
            else:
                door.counts.duplicates += 1
        any_is_new = any(isinstance(answer, Stored) for answer in answers)
        return Brief(202 if any_is_new else 200, json.dumps({"events": told}, separators=(",", ":")))

    async def _minimize_each(
        self, door: "_Door", items: Items, body: bytes, digest: UUID
    ) -> tuple[dict[int, tuple[Minimized, UUID]], list[dict[str, object]]]:
        """What is kept of each by its place, with its own digest; and what is told of all, so far of those left out."""
        match items.of(body):
            case Unreadable() | Unmet() as wrong:
                raise _refused(wrong, wrong.reason, digest)
            case found:
                pass
        if len(found) > MOST_ITEMS:
            many = problem(413, "Too many events", f"At most {MOST_ITEMS} events are taken in one post.")
            raise Refusal("too_many_events", many, digest)
        taken: dict[int, tuple[Minimized, UUID]] = {}
        told: list[dict[str, object]] = []
        for place, item in enumerate(found):
            if place % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)  # others are not held up by a long post
            itself = self._digest(b"body", item)
            told.append({})
            match door.kept.minimize(item) if item[:1] == b"{" else _NO_OBJECT:
                case Minimized() as minimized:
                    taken[place] = minimized, itself
                case wrong if door.source.partial:
                    self._refusals.refused(door.source.name, _refused(wrong, wrong.reason).code, itself)
                    told[place] = {"id": None, "duplicate": False, "reason": wrong.reason}
                case wrong:
                    raise _refused(wrong, items.named(place, wrong.reason), digest)
        return taken, told

    async def take_what_was_read(self, hint: Event, body: bytes) -> Outcome:
        """What a record says that a hint was about: kept and routed as what is posted is, and part of the hint's story."""
        door = self._sources.get(hint.source)
        if door is None or door.rereads is None:
            return Refused("its source posts no hints any more")
        digest = self._digest(b"body", body)
        match door.kept.minimize(body):
            case Unreadable(reason=reason) | Unmet(reason=reason):
                return Refused(f"policy not met: {reason}")
            case Minimized() as minimized:
                pass
        identity = self._identities.next()
        with self._tracing.follow(identity, minimized.type) as traceparent:
            event = self._event(identity, hint.source, minimized, traceparent)
            same, debts = self._same(event, minimized, None, digest), self._debts(event)
            try:
                answer = await self._batch.add(
                    Arrival(event=event, data=minimized.document, same=same, digest=digest, debts=debts)
                )
            except Unavailable:
                return Retry("what was read could not be stored")
        if isinstance(answer, Seen):
            return Duplicate(str(answer.event))
        if not debts:
            self._unrouted(event)
        return Delivered(str(event.id))

    async def expect(self, request: web.Request) -> web.StreamResponse | None:
        """`Expect: 100-continue`: a body that its head alone condemns is not asked for."""
        door = self._sources.get(request.match_info["source"])
        if door is None:
            return None
        try:
            judge_head(request, door.source.body, door.media)
        except Unacceptable as wrong:
            self._refusals.refused(door.source.name, wrong.code)
            return _unread(wrong)
        if request.version == HttpVersion11:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the answer proper has not begun
        return None

    # ── the steps ────────────────────────────────────────────────────────────────────────────────

    def _peer(self, request: Incoming) -> Address | None:
        peer: Address | None = None
        with suppress(ValueError):
            peer = ip_address(request.remote or "")
        return client_address(peer, request.headers.getall("X-Forwarded-For", ()), self._serve.trusted_proxies)

    def _may_vouch(self, request: Incoming) -> bool:
        """Whether who is connected, and not who is said to be behind it, is a proxy that we trust."""
        if on_unix_socket(request):
            return True
        with suppress(ValueError):
            return is_within(ip_address(request.remote or ""), self._serve.trusted_proxies)
        return False

    async def _read(self, request: Incoming, door: "_Door") -> bytes:
        try:
            judge_head(request, door.source.body, door.media)
            if isinstance(request, Post):
                return within(request.give_body(), door.source.body)
            return await read_body(request, door.source.body)
        except Unacceptable as wrong:
            raise Refusal(wrong.code, _unread(wrong)) from wrong

    def _greet(
        self,
        door: "_Door",
        asked: Handshake,
        answer: Callable[P, web.StreamResponse | None],
        *of: P.args,
        **named: P.kwargs,
    ) -> web.StreamResponse | None:
        """The answer to a handshake; None: it is none, and goes the way of all posts."""
        try:
            greeting = answer(*of, **named)
        except MalformedError:
            wrong = problem(422, "No handshake", f"What is to be echoed is no text of up to {LONGEST} bytes.")
            raise Refusal("handshake_malformed", wrong) from None
        if greeting is not None:
            if not asked.limit.take(time.monotonic()):
                raise Refusal("handshake_rate_limited", _too_many(asked.limit))
            self._metrics.handshakes.labels(door.source.name).inc()
            log_sparingly(LogEvent.HANDSHAKE_ANSWERED, level="info", source=door.source.name)
        return greeting

    def _limit(self, door: "_Door") -> None:
        """Counts only who is proven: a stranger must not be able to use up what a source may post."""
        if door.limit is not None and not door.limit.take(time.monotonic()):
            raise Refusal("rate_limited", _too_many(door.limit))

    def _limit_facility(self, door: "_Door", facility: str | None) -> None:
        """One site that floods uses up what is its own, and leaves the others of the same source alone."""
        if (limit := door.limit_of(facility)) is not None and not limit.take(time.monotonic()):
            raise Refusal("facility_rate_limited", _too_many(limit))

    async def _authenticate(self, request: Incoming, door: "_Door", token: str | None, body: bytes) -> Caller:
        """One answer for every reason: which check failed is told to us, never to the caller."""
        peer = self._peer(request) if door.source.from_ else None
        if _is_elsewhere(peer, door.source):
            raise Refusal("wrong_address", _not_proven(), self._digest(b"body", body))
        presented = Presented(
            headers=request.headers,
            body=body,
            target=request.raw_path if door.signs_target else "",
            token=token,
            peer=peer,
            at=time.time(),
            vouched=door.takes_vouchers and self._may_vouch(request),
        )
        match await door.scheme.authenticate(presented):
            case Unauthorized(reason=Reason() as reason, undecided=True):
                raise Refusal(reason, unavailable("It could not be told who you are; nothing was stored. Try again."))
            case Unauthorized(reason=reason):
                self._diagnosis.look(door.source.name, door.scheme, presented, reason)
                raise Refusal(reason, _not_proven(), self._digest(b"body", body))
            case Caller() as caller:
                door.counts.used[caller.secret] += 1
                return caller

    def _minimize(self, door: "_Door", body: bytes, digest: UUID) -> Minimized:
        match door.policies.minimize(body):
            case Unreadable() | Unmet() as wrong:
                raise _refused(wrong, wrong.reason, digest)
            case Minimized() as minimized:
                return minimized

    def _unrouted(self, event: Event) -> None:
        self._metrics.unrouted.labels(event.source).inc()
        log.info(LogEvent.EVENT_UNROUTED, event_id=str(event.id), source=event.source, type=event.type)

    def _event(self, identity: UUID, source: str, minimized: Minimized, traceparent: str) -> Event:
        received_at = self._clock.now()
        return Event(
            id=identity,
            source=source,
            type=minimized.type,
            subject=minimized.subject,
            facility=minimized.facility,
            time=minimized.time or received_at,
            data=minimized.data,
            policy=minimized.policy,
            policy_version=minimized.version,
            received_at=received_at,
            traceparent=traceparent,
        )

    def _same(self, event: Event, minimized: Minimized, caller: Caller | None, digest: UUID) -> UUID:
        """The dedup key: the id that the sender signed; else what the policy says; else all that it signed."""
        source = event.source.encode()
        if caller is not None and caller.signed_id is not None:
            return self._digest(b"id", source, caller.signed_id.encode())
        if (same := minimized.same) is not None:
            return self._digest(b"same", source, minimized.policy.encode(), same.encode())
        if caller is not None and caller.signed is not None:
            return self._digest(b"same signed", source, caller.signed)
        return self._digest(b"same body", source, digest.bytes)

    def _debts(self, event: Event) -> tuple[Debt, ...]:
        return self._owed(
            self._routes.choose(source=event.source, type=event.type, facility=event.facility, data=event.data), event
        )

    def _owed(self, chosen: Iterable[Owed], event: Event) -> tuple[Debt, ...]:
        debts = []
        for owed in chosen:
            destination = self._destinations[owed.destination]
            party = self._parties[owed.destination].get((event.source, event.facility))
            lane, key = destination.place(event.id, event.subject, ordered=owed.ordered, party=party)
            debts.append(Debt(lane=lane, destination=destination.id, key=key, give_up=owed.give_up))
        return tuple(debts)

    def _digest(self, purpose: bytes, *parts: bytes) -> UUID:
        """128 bits under our key: equal inputs are recognised, and nobody without the key can try them out."""
        mac = self._keyed[purpose].copy()
        for part in parts:
            mac.update(len(part).to_bytes(8, "big"))
            mac.update(part)
        return uuid_of(mac.digest())


class _Door:
    """One source, compiled."""

    def __init__(
        self, source: AnySource, config: Config, counts: SourceMetrics, scheme: Scheme, *, key: bytes, share: int
    ) -> None:
        self.source = source
        self.scheme = scheme
        accepted = [config.policies[name] for name in source.accepts]
        self.kept = Policies(accepted, key=key, texts=source.format == "form")
        self.policies: Policies | Hints | FormPolicies | WrappedPolicies = self.kept
        self.media = media_of(source)
        self.items = None if source.each is None else Items(source.each, wrapped_in=source.wrapped_in)
        if source.wrapped_in is not None:
            self.policies = WrappedPolicies(source.wrapped_in, self.kept)
        elif source.format == "form":
            self.policies = FormPolicies(accepted, self.kept)
        self.signs_target = source.signs_url or isinstance(source, HttpSignature)
        self.takes_token = isinstance(source, OdooNative)
        self.handshake = None if source.handshake is None else Handshake(source)
        self.rereads: Owed | None = None  # what a post of this source owes, where it is a hint
        if isinstance(source, OdooNative) and source.reread is not None:
            self.policies = Hints(fields_by_model(accepted))
            self.rereads = Owed(name_of(source.name), ordered=True, give_up=None)
        self.proofs = source.proofs
        self.takes_vouchers = isinstance(source, ClientCert)
        self.limit = None if source.limit is None else TokenBucket(per_second=source.limit.per_second / share)
        self._limits: dict[str | None, TokenBucket] = {}
        self._share = share
        self.counts = counts

    def limit_of(self, facility: str | None) -> TokenBucket | None:
        """Facilities are those of the configuration, so there are only so many of them."""
        if self.source.facility_limit is None:
            return None
        if facility not in self._limits:
            self._limits[facility] = TokenBucket(per_second=self.source.facility_limit.per_second / self._share)
        return self._limits[facility]


def _refused(wrong: Unreadable | Unmet, reason: str, digest: UUID | None = None) -> Refusal:
    if isinstance(wrong, Unreadable):
        return Refusal("unreadable", problem(400, "Unreadable body", reason), digest)
    return Refusal("policy_not_met", problem(422, "Policy not met", reason), digest)


def _answer(status: int, event: UUID, *, duplicate: bool) -> Brief:
    return Brief(status, f'{{"id":"{event}","duplicate":{"true" if duplicate else "false"}}}')


def _is_elsewhere(peer: Address | None, source: AnySource) -> bool:
    """Whether a source may not post from this address."""
    return bool(source.from_) and (peer is None or not any(peer in network for network in source.from_))


def _forget_body(request: Incoming) -> None:
    """Whoever is refused before it was read: an answer that waits holds none."""
    if isinstance(request, Post):
        request.give_body()


def _too_many(limit: TokenBucket) -> web.Response:
    wait = str(max(1, ceil(limit.wait)))
    return problem(429, "Too many requests", "Slow down.", headers={"Retry-After": wait})


def _not_proven() -> web.Response:
    return problem(401, "Not proven", "The request does not prove that it comes from this source.")


def _unread(wrong: Unacceptable) -> web.Response:
    """What is left of the body is not waited for."""
    answer = problem(wrong.status, wrong.title, wrong.detail)
    answer.force_close()
    return answer
