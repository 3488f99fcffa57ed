"""A stand-in for Odoo on loopback: it is not Odoo, and answers as one was seen to answer.

What it does was recorded from a running Odoo 19.0 (its two doors, its errors by name and status, activities, notes,
values, a button that says yes and does nothing); what was not recorded is not here.  It keeps everything in memory,
checks no business rule but those that a test needs, and can be told to fail, to hang, or to cut a reply off after it
did what it was asked: `trouble`.

    odoo = await OdooStandIn.start()
    odoo.add("purchase.order", 42, state="to approve")
    odoo.trouble["message_post"] = Trouble.DO_AND_CUT
"""

import asyncio
import html
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self

from aiohttp import web

Values = dict[str, Any]


class Trouble(Enum):
    """What happens to the next call of a method, once."""

    HANG = "says nothing, and does nothing"
    CUT = "hangs up, and does nothing"
    DO_AND_HANG = "does it, and says nothing"
    DO_AND_CUT = "does it, and hangs up before it has said so"
    BAD_GATEWAY = "a proxy's HTML page: 502"
    UNAVAILABLE = "a proxy's HTML page: 503"
    REDIRECT = "a proxy's redirect: 302"
    GIBBERISH = "200 and HTML"


class OdooError(Exception):
    """An exception inside Odoo, as its doors tell it."""

    def __init__(self, name: str, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.name = name
        self.message = message
        self.status = status

    def told(self) -> Values:
        """With the traceback that Odoo adds, and that nobody should keep."""
        debug = (
            f'Traceback (most recent call last):\n  File "/opt/odoo/odoo/http.py", line 1\n{self.name}: {self.message}'
        )
        return {"name": self.name, "message": self.message, "arguments": [self.message], "context": {}, "debug": debug}


def access_error() -> OdooError:
    return OdooError("odoo.exceptions.AccessError", "You are not allowed to modify these records.", 403)


def missing_error() -> OdooError:
    return OdooError("odoo.exceptions.MissingError", "Record does not exist or has been deleted.", 404)


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    id: int
    login: str
    key: str
    denied: frozenset[str] = frozenset()  # such as "purchase.order:write"
    approves: bool = False  # in the group behind button_approve
    companies: tuple[int, ...] = (1,)


GATEWAY = User(id=7, login="gateway@hospital.example", key="stand-in-key-of-the-gateway-0000000000000")

FIELDS: Mapping[str, Mapping[str, str]] = {
    "purchase.order": {
        "name": "char",
        "state": "selection",
        "amount_total": "monetary",
        "date_planned": "datetime",
        "date_reviewed": "date",
        "note": "html",
        "priority": "selection",
        "invoice_count": "integer",
        "mail_reminder_confirmed": "boolean",
        "user_id": "many2one",
        "company_id": "many2one",
        "order_line": "one2many",
    },
    "hr.employee": {"name": "char", "work_email": "char", "department_id": "many2one", "active": "boolean"},
    "res.users": {"login": "char", "company_id": "many2one", "company_ids": "many2many", "active": "boolean"},
    "mail.activity": {
        "res_model": "char",
        "res_id": "integer",
        "summary": "char",
        "note": "html",
        "user_id": "many2one",
        "activity_type_id": "many2one",
        "active": "boolean",
    },
    "mail.message": {"model": "char", "res_id": "integer", "body": "html", "message_type": "selection"},
}
BOOKKEEPING = ("id", "create_date", "write_date", "write_uid")


@dataclass
class Call:
    """What was asked, by whom."""

    user: User
    model: str
    method: str
    ids: list[int]
    arguments: Values
    context: Values


@dataclass
class OdooStandIn:
    version: str = "19.0"
    database: str = "production"
    users: list[User] = field(default_factory=lambda: [GATEWAY])
    records: dict[str, dict[int, Values]] = field(default_factory=lambda: defaultdict(dict))
    hidden: set[tuple[str, int]] = field(default_factory=set)  # by a record rule
    trouble: dict[str, Trouble] = field(default_factory=dict)  # by method
    errors: dict[str, OdooError] = field(default_factory=dict)  # by method, for as long as it stands here
    pause: float = 0  # seconds that each call takes
    calls: list[Call] = field(default_factory=list)
    logins: int = 0
    most_at_once: Counter[tuple[str, int]] = field(default_factory=Counter)  # calls on one record at a time
    url: str = ""

    @classmethod
    async def start(cls, *, port: int = 0, **given: Any) -> Self:
        odoo = cls(**given)
        application = web.Application()
        application.router.add_get("/web/version", odoo._web_version)
        application.router.add_post("/web/webclient/version_info", odoo._version_info)
        application.router.add_post("/jsonrpc", odoo._jsonrpc)
        application.router.add_post("/json/2/{model}/{method}", odoo._json2)
        odoo._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await odoo._runner.setup()
        site = web.TCPSite(odoo._runner, "127.0.0.1", port)
        await site.start()
        odoo.url = f"http://127.0.0.1:{odoo._runner.addresses[0][1]}"
        return odoo

    async def stop(self) -> None:
        self._over.set()
        await self._runner.cleanup()

    def __post_init__(self) -> None:
        self._runner: web.AppRunner
        self._over = asyncio.Event()
        self._now: Counter[tuple[str, int]] = Counter()
        for user in self.users:
            self.add(
                "res.users", user.id, login=user.login, company_id=user.companies[0], company_ids=[*user.companies]
            )

    def add(self, _model: str, _id: int | None = None, /, **values: Any) -> int:
        """Puts a record in, past all rights; without an id it gets the next one."""
        id_ = _id or max(self.records[_model], default=0) + 1
        self.records[_model][id_] = {"active": True, **values}
        return id_

    def found(self, _model: str, /, **values: Any) -> list[Values]:
        """The records with these values, past all rights."""
        return [
            {"id": id_, **record}
            for id_, record in self.records[_model].items()
            if all(record.get(name) == value for name, value in values.items())
        ]

    # ── the doors ──────────────────────────────────────────────────────────────────────────────────

    @property
    def _major(self) -> int:
        return int(re.findall(r"\d+", self.version)[0])

    async def _web_version(self, _: web.Request) -> web.Response:
        if self._major < 19:
            return _page(404, "Not Found")
        return web.json_response({"version_info": [self._major, 0, 0, "final", 0, ""], "version": self.version})

    async def _version_info(self, request: web.Request) -> web.Response:
        asked = await request.json()
        result = {"server_version": self.version, "server_version_info": [self._major, 0, 0, "final", 0, ""]}
        return web.json_response({"jsonrpc": "2.0", "id": asked.get("id"), "result": result})

    async def _jsonrpc(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        answer: Values = {"jsonrpc": "2.0", "id": asked["id"]}
        try:
            said = await self._service(request, **asked["params"])
        except OdooError as error:
            answer["error"] = {"code": 200, "message": "Odoo Server Error", "data": error.told()}
        else:
            if isinstance(said, web.StreamResponse):
                return said
            if said is not None:
                answer["result"] = said
        return web.json_response(answer)

    async def _service(self, request: web.Request, *, service: str, method: str, args: list[Any]) -> Any:
        match service, method, args:
            case "common", "version", []:
                return {"server_version": self.version}
            case "common", "login", [database, login, key]:
                self._check_database(database)
                self.logins += 1
                return next((user.id for user in self.users if (user.login, user.key) == (login, key)), False)
            case "object", "execute_kw", [database, uid, key, model, method, args, kwargs]:
                self._check_database(database)
                user = next((user for user in self.users if (user.id, user.key) == (uid, key)), None)
                if user is None:
                    raise OdooError("odoo.exceptions.AccessDenied", "Access Denied", 403)
                return await self._answer(request, self._by_position(user, model, method, args, kwargs))
            case _:
                raise OdooError("builtins.NameError", "Method not available")

    async def _json2(self, request: web.Request) -> web.StreamResponse:
        if self._major < 19 or request.headers.get("x-odoo-database", self.database) != self.database:
            return _page(404, "Not Found")
        try:
            said = await self._answer(request, self._by_name(request, await request.json()))
        except OdooError as error:
            return web.json_response(error.told(), status=error.status)
        return said if isinstance(said, web.StreamResponse) else web.json_response(said)

    def _check_database(self, database: str) -> None:
        if database != self.database:
            message = f'connection to server failed: FATAL:  database "{database}" does not exist'
            raise OdooError("psycopg2.OperationalError", message)

    def _by_position(self, user: User, model: str, method: str, args: list[Any], kwargs: Values) -> Call:
        if model not in FIELDS:
            raise OdooError("odoo.exceptions.UserError", f"Object {model} doesn't exist", 422)
        if method.startswith("_"):
            raise OdooError("odoo.exceptions.AccessError", "Private methods cannot be called remotely.", 403)
        if method not in METHODS or (method == "has_access" and self._major < 18):
            raise OdooError("builtins.AttributeError", f"The method '{model}.{method}' does not exist")
        context = kwargs.pop("context", {})
        ids: list[int] = []
        if method not in MODEL_METHODS:
            ids, *args = args
        try:
            bound = inspect.signature(METHODS[method]).bind(self, None, *args, **kwargs)
        except TypeError as error:
            raise OdooError("builtins.TypeError", str(error)) from None
        arguments = {name: value for name, value in bound.arguments.items() if name not in {"self", "call", "more"}}
        return Call(user, model, method, ids, arguments | bound.arguments.get("more", {}), context)

    def _by_name(self, request: web.Request, arguments: Values) -> Call:
        key = request.headers.get("authorization", "").removeprefix("bearer ")
        user = next((user for user in self.users if user.key == key), None)
        model, method = request.match_info["model"], request.match_info["method"]
        ids, context = arguments.pop("ids", []), arguments.pop("context", {})
        if user is None:
            raise OdooError("werkzeug.exceptions.Unauthorized", "Invalid apikey", 401)
        if model not in FIELDS:
            raise OdooError("werkzeug.exceptions.NotFound", f"the model {model!r} does not exist", 404)
        if method not in METHODS:
            raise OdooError("werkzeug.exceptions.NotFound", f"The method '{model}.{method}' does not exist", 404)
        if ids and method in MODEL_METHODS:
            raise OdooError("werkzeug.exceptions.UnprocessableEntity", f"cannot call {model}.{method} with ids", 422)
        try:
            inspect.signature(METHODS[method]).bind(self, None, **arguments)
        except TypeError as error:
            raise OdooError("werkzeug.exceptions.UnprocessableEntity", str(error), 422) from None
        return Call(user, model, method, ids, arguments, context)

    async def _answer(self, request: web.Request, call: Call) -> Any:
        """What the method returns, or what its trouble makes of it."""
        trouble = self.trouble.pop(call.method, None)
        match trouble:
            case Trouble.BAD_GATEWAY:
                return _page(502, "Bad Gateway")
            case Trouble.UNAVAILABLE:
                return _page(503, "Service Unavailable", {"retry-after": "7"})
            case Trouble.REDIRECT:
                return _page(302, "Found", {"location": "/web/login"})
            case Trouble.GIBBERISH:
                return _page(200, "Welcome")
            case Trouble.DO_AND_HANG | Trouble.DO_AND_CUT | None:
                result = await self._do(call)
            case Trouble.HANG | Trouble.CUT:
                result = None
        if trouble in {Trouble.HANG, Trouble.DO_AND_HANG}:
            await self._over.wait()
        if trouble is not None and request.transport is not None:
            request.transport.abort()
        return result

    # ── the methods ────────────────────────────────────────────────────────────────────────────────

    async def _do(self, call: Call) -> Any:
        self.calls.append(call)
        with self._counted(call):
            await asyncio.sleep(self.pause)
            if call.method in self.errors:
                raise self.errors[call.method]
            return METHODS[call.method](self, call, **call.arguments)

    @contextmanager
    def _counted(self, call: Call) -> Iterator[None]:
        on = [(call.model, id_) for id_ in call.ids]
        for record in on:
            self._now[record] += 1
            self.most_at_once[record] = max(self.most_at_once[record], self._now[record])
        try:
            yield
        finally:
            for record in on:
                self._now[record] -= 1

    def context_get(self, call: Call) -> Values:
        return {"lang": "en_US", "tz": "Europe/Berlin", "uid": call.user.id}

    def has_access(self, call: Call, operation: str) -> bool:
        denied = f"{call.model}:{operation}" in call.user.denied
        return not denied and not any(not self._sees(call, id_) for id_ in call.ids)

    def check_access_rights(self, call: Call, operation: str, *, raise_exception: bool = True) -> bool:
        if f"{call.model}:{operation}" in call.user.denied:
            if raise_exception:
                raise access_error()
            return False
        return True

    def fields_get(
        self, call: Call, allfields: Sequence[str] | None = None, attributes: Sequence[str] | None = None
    ) -> Values:
        known = {
            **dict.fromkeys(BOOKKEEPING, "datetime"),
            "id": "integer",
            "write_uid": "many2one",
            **FIELDS[call.model],
        }
        return {
            name: {
                key: value
                for key, value in {"type": known[name], "readonly": False}.items()
                if key in (attributes or ())
            }
            for name in (allfields or known)
            if name in known
        }

    def search_read(  # the order is Odoo's
        self,
        call: Call,
        domain: Sequence[Any] = (),
        fields: Sequence[str] | None = None,
        offset: int = 0,
        limit: int | None = None,
        order: str | None = None,
    ) -> list[Values]:
        del order
        self.check_access_rights(Call(call.user, call.model, "", [], {}, {}), "read")
        self._check_fields(call, [*(fields or ()), *(term[0] for term in domain)])
        hits = [
            {"id": id_, **{name: _shown(record.get(name, False), name) for name in fields or FIELDS[call.model]}}
            for id_, record in self.records[call.model].items()
            if self._sees(call, id_)
            and (record["active"] or call.context.get("active_test") is False)
            and all(_matches({"id": id_, **record}, term) for term in domain)
        ]
        return hits[offset:][:limit]

    def read(self, call: Call, fields: Sequence[str] | None = None, load: str | None = "_classic_read") -> list[Values]:
        """Archived ones too; those that are gone are left out, those that a rule hides are an error."""
        self.check_access_rights(Call(call.user, call.model, "", [], {}, {}), "read")
        self._check_fields(call, fields or ())
        there = {id_: self.records[call.model][id_] for id_ in call.ids if id_ in self.records[call.model]}
        if not all(self._sees(call, id_) for id_ in there):
            raise access_error()
        show = _shown if load == "_classic_read" else lambda value, _: value
        return [
            {"id": id_, **{name: show(record.get(name, False), name) for name in fields or FIELDS[call.model]}}
            for id_, record in there.items()
        ]

    def write(self, call: Call, vals: Values) -> bool:
        self._check_access(call, "write")
        self._check_fields(call, vals)
        for name, value in vals.items():
            self._check_value(call, name, value)
        for id_ in call.ids:
            self.records[call.model][id_] |= vals
        return True

    def activity_schedule(
        self,
        call: Call,
        act_type_xmlid: str = "",
        date_deadline: str | None = None,
        summary: str = "",
        note: str = "",
        **more: Any,
    ) -> list[int]:
        """The same call twice makes two activities; `note` is HTML, which nobody escapes here."""
        self._check_access(call, "write")
        return [
            self.add(
                "mail.activity",
                res_model=call.model,
                res_id=id_,
                activity_type=act_type_xmlid,
                date_deadline=date_deadline,
                summary=summary,
                note=note,
                user_id=more.get("user_id", call.user.id),
            )
            for id_ in call.ids
        ]

    def message_post(
        self,
        call: Call,
        body: str = "",
        message_type: str = "notification",
        subtype_xmlid: str | None = None,
        *,
        body_is_html: bool = False,
        **more: Any,
    ) -> list[int]:
        """The same call twice posts two messages; `body` is escaped (before 17 it was taken for HTML)."""
        del more
        self._check_access(call, "write")
        written = body if body_is_html or self._major < 17 else f"<p>{html.escape(body)}</p>"
        return [
            self.add(
                "mail.message",
                model=call.model,
                res_id=id_,
                body=written,
                message_type=message_type,
                subtype=subtype_xmlid,
                author=call.user.id,
            )
            for id_ in call.ids
        ]

    def button_approve(self, call: Call, *, force: bool = False) -> Values:
        """For a user outside the group: 200, `{}`, and nothing happens."""
        for id_ in call.ids:
            record = self.records[call.model].get(id_)
            if record is None:
                raise missing_error()
            if (call.user.approves or force) and record["state"] == "to approve":
                record["state"] = "purchase"
        return {}

    def button_cancel(self, call: Call) -> bool:
        for id_ in call.ids:
            record = self.records[call.model][id_]
            if record["state"] == "done":
                raise OdooError(
                    "odoo.exceptions.UserError", "Unable to cancel: the order of Maria Example is locked.", 422
                )
            record["state"] = "cancel"
        return True

    def _sees(self, call: Call, id_: int) -> bool:
        return (call.model, id_) not in self.hidden

    def _check_access(self, call: Call, operation: str) -> None:
        if f"{call.model}:{operation}" in call.user.denied:
            raise access_error()
        for id_ in call.ids:
            if id_ not in self.records[call.model]:
                raise missing_error()
            if not self._sees(call, id_):
                raise access_error()

    def _check_fields(self, call: Call, names: Sequence[str] | Values) -> None:
        for name in names:
            if name not in FIELDS[call.model] and name not in BOOKKEEPING:
                raise OdooError("builtins.ValueError", f"Invalid field '{name}' on model '{call.model}'")

    def _check_value(self, call: Call, name: str, value: Any) -> None:
        wanted = {"datetime": r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "date": r"\d{4}-\d\d-\d\d"}.get(
            FIELDS[call.model][name]
        )
        if wanted and value is not False and not re.fullmatch(wanted, str(value)):
            raise OdooError("builtins.ValueError", f"time data {value!r} does not match format")
        if FIELDS[call.model][name] == "many2one" and not (value is False or isinstance(value, int)):
            raise OdooError("builtins.IndexError", "tuple index out of range")


METHODS: Mapping[str, Callable[..., Any]] = {
    name: getattr(OdooStandIn, name)
    for name in [
        "activity_schedule",
        "button_approve",
        "button_cancel",
        "check_access_rights",
        "context_get",
        "fields_get",
        "has_access",
        "message_post",
        "read",
        "search_read",
        "write",
    ]
}
MODEL_METHODS = frozenset({"check_access_rights", "context_get", "fields_get", "search_read"})


def _matches(record: Values, term: Sequence[Any]) -> bool:
    name, operator, wanted = term
    value = record.get(name, False)
    match operator:
        case "=":
            return bool(value == wanted)
        case "in":
            return value in wanted
        case "ilike":  # as in SQL: % and _ stand for others
            pattern = re.escape(wanted).replace("%", ".*").replace("_", ".")
            return bool(re.search(pattern, str(value), re.IGNORECASE | re.DOTALL))
        case _:
            raise OdooError("builtins.ValueError", f"Invalid operator {operator!r} in domain term")


def _shown(value: Any, name: str) -> Any:
    if name.endswith("_id") and isinstance(value, int) and value is not False and name != "res_id":
        return [value, f"number {value}"]
    return value


def _page(status: int, title: str, headers: Mapping[str, str] | None = None) -> web.Response:
    text = f"<!doctype html>\n<html lang=en>\n<title>{status} {title}</title>\n<h1>{title}</h1>\n"
    return web.Response(status=status, text=text, content_type="text/html", headers=headers)
