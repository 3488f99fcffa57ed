"""`sluicegate policy`: what would be kept of a sample, a proposal, what changed, and the auditor's page."""

import json
import re
from pathlib import Path
from urllib.parse import urlencode

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import cli
from gateway.config import load_policies
from gateway.config_references import destinations_of
from gateway.minimize import Minimized, Policies
from gateway.policy_draft import NoSampleError, draft
from gateway.policy_trial import try_sample
from tests.door import ENVIRON, KEY, configured

CANARY = "Maria Canary"
TEXT = """\
facilities: {north: {name: North}, south: {name: South}}
systems: {erp: {connector: odoo, url: "https://erp.example", database: x, user: y, key: env:TOKEN}}
sources:
  odoo: {scheme: odoo-native, token: env:TOKEN, accepts: [order, staff]}
policies:
  order:
    version: 3
    purpose: approval | of <b>purchases</b>
    match: {model: order}
    type: erp.order.{status}
    subject: order/{id}
    facility: {from: site.code, of: {N: north}}
    keep:
      id: {from: id, type: int, min: 1}
      status: {from: state, type: enum, of: {draft: draft, "to pay": open}}
      amount: {from: total.net, type: decimal, bucket: [0, 5000]}
      buyer: {from: buyer, type: int, token: staff}
      lines: {from: lines, type: [int], optional: true}
      system: {const: erp}
  staff:
    version: 1
    purpose: accounts
    class: workforce_pii
    match: {model: staff}
    type: erp.staff
    keep: {id: {from: id, type: int}, code: {from: code, type: code, pattern: "[A-Z|]{2}"}}
routes:
  orders: {when: {type: erp.order.*}, to: [desk]}
  people: {when: {type: erp.staff}, to: [accounts]}
destinations:
  desk: {connector: http, url: "https://desk.example", secret: env:OUT_SECRET}
  accounts: {connector: http, url: "https://accounts.example", secret: env:OUT_SECRET, receives: workforce_pii}
"""
ORDER = {
    "model": "order", "id": 7, "state": "to pay", "total": {"net": 8625.0, "note": CANARY}, "buyer": 4711,
    "site": {"code": "N"}, "customer": {"name": CANARY, "tags": [CANARY, {"deep": CANARY}]}, "lines": [1, 2],
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "sluicegate.yaml"
    path.write_text(TEXT)
    return path


def run(path: Path, *words: str, given: bytes = b"") -> Result:
    result = CliRunner().invoke(cli.main, [*words, "--config", str(path)], input=given, env=ENVIRON)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def sample(**changes: object) -> bytes:
    return json.dumps({**ORDER, **changes}).encode()


# ── test ────────────────────────────────────────────────────────────────────────────────────────────


def test_what_would_be_kept_and_dropped_of_a_sample_is_told_with_the_reason(path: Path) -> None:
    result = run(path, "policy", "test", "-", given=sample())
    assert result.exit_code == 0
    assert result.output.splitlines()[0] == "Accepted by order/3, as erp.order.open, about order/7, in north."
    told = [re.split(r" {2,}", line.strip()) for line in result.output.splitlines()[1:] if line.strip()]
    assert ["id", "7", "int", "from id"] in told
    assert ["amount", "5000", "decimal", "from total.net"] in told
    assert ["buyer", "a pseudonym", "int", "from buyer"] in told
    assert ["system", "erp", "const"] in told
    assert ["customer.name", "no policy names it"] in told
    assert ["customer.tags[].deep", "no policy names it"] in told
    assert ["total.note", "no policy names it"] in told
    assert ["model", "is matched, not kept"] in told
    assert ["site.code", "finds the facility"] in told
    for secret in (CANARY, "4711", "8625"):
        assert secret not in result.output


def test_everything_that_is_wrong_is_told_at_once_and_the_status_says_so(path: Path) -> None:
    result = run(path, "policy", "test", "-", given=sample(state=CANARY, id=0, site={"code": "X"}, buyer=None))
    assert result.exit_code == 1
    for reason in (
        "state must be one of the values that the policy names",
        "id must be an integer from 1",
        "buyer is missing",
    ):
        assert reason in result.output
    assert CANARY not in result.output
    only_the_site = run(path, "policy", "test", "-", given=sample(site={"code": CANARY}))
    assert "site.code must be one of the values that the policy names" in only_the_site.output
    assert only_the_site.exit_code == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (sample(model="visit"), 'order does not match: model is not "order"'),
        (b"[]", "the body is not a JSON object"),
        (b'{"model": ', "the body is not JSON"),
        (sample()[:-1] + b', "id": 8}', "id stands twice in the body"),
        (b"\xff", "the body is not a JSON object"),
    ],
)
def test_a_sample_that_no_policy_takes_is_told_why(path: Path, given: bytes, reason: str) -> None:
    result = run(path, "policy", "test", "-", given=given)
    assert result.exit_code == 1
    assert reason in result.output


def test_what_is_told_to_programs_is_the_same(path: Path) -> None:
    result = run(path, "policy", "test", "--json", "--source", "odoo", "-", given=sample())
    (event,) = json.loads(result.stdout)["events"]
    assert (event["policy"], event["wrong"]) == ("order/3", [])
    assert {each["field"]: each["value"] for each in event["kept"]}["status"] == "open"


def test_a_source_that_is_not_there_is_told(path: Path) -> None:
    result = run(path, "policy", "test", "--source", "odo", "-", given=sample())
    assert result.exit_code == 1
    assert 'There is no source "odo"; did you mean "odoo"?' in result.output
    path.write_text(
        TEXT.replace("policies:", "  other: {scheme: odoo-native, token: env:TOKEN, accepts: [order]}\npolicies:", 1)
    )
    assert "--source odoo | other" in run(path, "policy", "test", "-", given=sample()).output


def test_a_sample_is_read_as_its_source_posts_it(path: Path) -> None:
    several = TEXT.replace(
        "accepts: [order, staff]", "accepts: [order, staff], format: 'form-json:payload', each: $.value"
    )
    path.write_text(several)
    body = urlencode({"payload": json.dumps({"value": [ORDER, {"model": "staff", "id": 1, "code": "AB"}]})}).encode()
    result = run(path, "policy", "test", "-", given=body)
    assert result.exit_code == 0, result.output
    assert [line for line in result.output.splitlines() if line.startswith("Accepted")] == [
        "Accepted by order/3, as erp.order.open, about order/7, in north.",
        "Accepted by staff/1, as erp.staff.",
    ]
    assert run(path, "policy", "test", "-", given=b"payload=1&payload=2").exit_code == 1
    people = TEXT.replace("accepts: [order, staff]", "accepts: [staff], format: form")
    path.write_text(people.replace("  orders: {when: {type: erp.order.*}, to: [desk]}\n", ""))
    result = run(
        path, "policy", "test", "-", given=urlencode({"model": "staff", "id": "1", "code": "AB", "x": CANARY}).encode()
    )
    assert result.exit_code == 0
    assert "no policy names it" in result.output
    assert CANARY not in result.output


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*ORDER, "x"]), ANYTHING, max_size=4))
def test_a_trial_says_accepted_exactly_where_the_door_accepts(changes: dict[str, object]) -> None:
    config = CONFIG
    body = sample(**changes)
    verdict = Policies([config.policies["order"]], key=KEY).minimize(body)
    (trial,) = try_sample(config.sources["posts"], config.policies, body)
    assert (not trial.wrong) == isinstance(verdict, Minimized)
    if isinstance(verdict, Minimized):
        assert {each.field for each in trial.kept} == verdict.data.keys()


def policy_section(text: str) -> str:
    section = text.partition("policies:\n")[2].partition("routes:\n")[0]
    return re.sub(r"^  ", "", section, flags=re.MULTILINE)


CONFIG = configured(
    policies=policy_section(TEXT),
    sources="posts: {scheme: odoo-native, token: env:TOKEN, accepts: [order]}\n",
    routes="all: {when: {type: erp.order.*}, to: [partner]}\n",
)


# ── draft ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_draft_keeps_the_number_of_the_record_and_nothing_else(path: Path, tmp_path: Path) -> None:
    told = run(
        path,
        "policy",
        "draft",
        "--name",
        "orders",
        "-",
        given=sample(state="draft", code="FR-12", on="2026-12-01", who="anna.canary@x.example"),
    )
    assert told.exit_code == 0
    for secret in (CANARY, "canary", "to pay", "8625", "4711", "FR-12", "2026"):
        assert secret not in told.output
    drafted = tmp_path / "draft.yaml"
    drafted.write_text(told.output)
    policy = load_policies(drafted, {})["orders"]
    assert list(policy.keep) == ["id"]
    assert policy.match == {"model": "order"}
    assert isinstance(Policies([policy], key=KEY).minimize(sample()), Minimized)
    opened = re.sub(r"^      # ([a-z_0-9]+: \{)", r"      \1", told.output, flags=re.MULTILINE)
    drafted.write_text(opened)
    kept = load_policies(drafted, {})["orders"].keep
    assert {name: field.kind for name, field in kept.items()} == {
        "id": "int", "state": "enum", "net": "decimal", "buyer": "int", "code": "enum", "lines": "int", "code_2": "code", "_on": "date",
    }  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=6) | st.sampled_from(["id", "_id", "a", "A", "a.b", "type", "on", "no", "1"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
            | st.from_regex(r"[A-Za-z0-9/:._-]{1,12}", fullmatch=True),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
            max_leaves=6,
        ),
        min_size=1,
        max_size=6,
    )
)  # fmt: skip
def test_a_draft_of_whatever_sample_can_be_read_once_its_lines_are_opened(body: dict[str, object]) -> None:
    try:
        told = draft(json.dumps(body).encode(), "drafted")
    except NoSampleError:
        return
    opened = re.sub(r"^      # ([a-z_0-9]+: \{)", r"      \1", told, flags=re.MULTILINE)
    if re.search(r"^      [a-z_]", opened, re.MULTILINE):
        path = FOLDER / "draft.yaml"
        path.write_text(opened)
        load_policies(path, {})


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER  # noqa: PLW0603 — hypothesis runs many examples in one test
    FOLDER = tmp_path_factory.mktemp("drafts")


FOLDER = Path()


@pytest.mark.parametrize("given", [b"", b"[]", b"5", b"{}", b"\xff", b"{", b"[" * 5000])
def test_what_is_no_sample_is_told(path: Path, given: bytes) -> None:
    result = run(path, "policy", "draft", "-", given=given)
    assert result.exit_code == 1
    assert "The sample is no JSON" in result.output


def test_a_draft_has_a_name_that_a_policy_can_have(path: Path) -> None:
    assert run(path, "policy", "draft", "--name", "No Name", "-", given=sample()).exit_code == 2


# ── diff ────────────────────────────────────────────────────────────────────────────────────────────


def changed(path: Path, *changes: tuple[str, str]) -> Path:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    other = path.with_name("other.yaml")
    other.write_text(text)
    return other


def test_what_changed_between_two_files_is_told_policy_by_policy(path: Path) -> None:
    other = changed(
        path,
        ("version: 3", "version: 4"),
        ("type: decimal, bucket: [0, 5000]", "type: decimal, round: 2"),
        ("      buyer: {from: buyer, type: int, token: staff}\n", ""),
        ("system: {const: erp}", "code: {from: code, type: code, pattern: '[A-Z]'}"),
        ("    purpose: accounts\n    class: workforce_pii", "    purpose: people\n    class: document"),
        ("version: 1", "version: 2"),
    )
    result = run(path, "policy", "diff", str(path), str(other))
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "order: version 3 → 4",
        "  keeps amount otherwise: {from: total.net, type: decimal, bucket: [0, 5000]} became {from: total.net, type: decimal, round: 2}",
        "  keeps code, too: {from: code, type: code, pattern: [A-Z]}",
        "  keeps buyer no more",
        "  keeps system no more",
        "staff: version 1 → 2",
        "  purpose: accounts became people",
        "  class: workforce_pii became document (more than before)",
    ]


def test_a_policy_that_keeps_something_else_under_its_number_is_told_and_the_status_says_so(path: Path) -> None:
    other = changed(path, ("min: 1", "min: 2"))
    result = run(path, "policy", "diff", str(other))  # with the configuration
    assert result.exit_code == 1
    assert "give it a new version" in result.output
    assert json.loads(run(path, "policy", "diff", "--json", str(other)).stdout)["policies"][0]["unnumbered"] is True


def test_policies_that_came_or_went_are_told_and_a_purpose_alone_needs_no_number(path: Path) -> None:
    other = changed(path, ("  staff:\n", "  people:\n"), ("purpose: approval", "purpose: a look"))
    result = run(path, "policy", "diff", str(path), str(other))
    assert result.exit_code == 0
    assert "people: version none → 1" in result.output
    assert "staff: version 1 → none" in result.output
    assert run(path, "policy", "diff", str(path)).output == "No policy differs.\n"


def test_a_comparison_needs_no_secret_and_tells_mistakes_of_the_policies_alone(path: Path) -> None:
    words = ["policy", "diff", "--config", str(path), str(path)]
    assert CliRunner().invoke(cli.main, words, env={}).output == "No policy differs.\n"
    bad = changed(path, ("type: int, min: 1", "type: txt"), ("to: [desk]", "to: [nowhere]"))
    result = run(path, "policy", "diff", str(bad))
    assert result.exit_code == 1
    assert "policies.order.keep.id has no type" in result.output
    assert "nowhere" not in result.output
    bad.write_text(TEXT + "\n\tx: [")
    assert run(path, "policy", "diff", str(bad)).exit_code == 1


# ── report ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_auditors_page_names_purposes_classes_fields_and_destinations(path: Path) -> None:
    page = run(path, "policy", "report").output
    for line in (
        r"| order | 3 | approval \| of \<b\>purchases\</b\> | metadata | 6 | desk |",
        r"| staff | 1 | accounts | workforce\_pii | 2 | accounts |",
        "| From | odoo (odoo-native) |",
        r"| status | state | one of draft, open |",
        r"| amount | total.net | one of 0, 5000, the bucket of a number |",
        r"| buyer | buyer | a pseudonym, the same for the same int within staff; it stays personal data |",
        r"| lines | lines | a list of up to 100, each a whole number; may be missing |",
        r"| system |  | always erp |",
        r"| code | code | a code of up to 64 characters that matches \[A-Z\|\]\{2\} |",
        r"| accounts | http | workforce\_pii | nothing |",
    ):
        assert line in page.splitlines(), line


def test_the_page_in_html_is_well_formed_and_runs_nothing(path: Path) -> None:
    page = run(path, "policy", "report", "--html").output
    assert "approval | of &lt;b&gt;purchases&lt;/b&gt;" in page
    assert "<b>" not in page
    for tag in ("table", "tbody", "tr", "td", "h1", "h2", "body", "html"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag
    assert re.findall(r"<script|https?://|\son\w+=", page) == []


def test_a_policy_reaches_a_destination_only_by_a_route_that_may_take_its_events() -> None:
    assert destinations_of(CONFIG.policies["order"], CONFIG) == ["partner"]
    assert destinations_of(CONFIG.policies["staff"], CONFIG) == []  # no source posts it
