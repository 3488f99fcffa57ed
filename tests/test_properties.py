"""Whatever comes in a header, and whichever byte of what was signed is another: nothing raises, nothing is believed."""

import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.authenticate import Caller, Unauthorized
from observability.traceparent import read, write
from tests.door import presented, scheme
from tests.mutations import METER, PROOFS
from tests.program import SECRETS

ENVIRON = {"SHOP": SECRETS["SHOP_SECRET"], "METER": METER}
SCHEMES = {
    name: scheme(text, ENVIRON)
    for name, text in {
        "shop": "scheme: standard-webhooks, secrets: [env:SHOP]",
        "meter": "scheme: hmac, header: X-Signature, secrets: [env:METER]",
        "code": "scheme: github, secrets: [env:METER]",
        "pay": "scheme: stripe, secrets: [env:METER]",
        "chat": "scheme: slack, secrets: [env:METER]",
    }.items()
}
UNSIGNED = {"content-type", "x-github-delivery"}
LIKE_A_PARENT = st.from_regex(r"[0-9a-fA-F]{2}-[0-9a-fA-F]{32}-[0-9a-fA-F]{16}-[0-9a-f]{2}(-.*)?", fullmatch=True)


@given(header=st.none() | st.text(max_size=80) | LIKE_A_PARENT)
@settings(max_examples=400, deadline=None)
def test_a_traceparent_is_read_as_the_standard_says_or_not_at_all(header: str | None) -> None:
    found = read(header)
    if found is None:
        return
    assert header is not None
    assert not header.startswith("ff")
    assert re.fullmatch(r"[0-9a-f]{32}", found.trace_id)
    assert re.fullmatch(r"[0-9a-f]{16}", found.span_id)
    assert 0 not in (int(found.trace_id, 16), int(found.span_id, 16))
    assert read(write(found.trace_id, found.span_id, sampled=found.sampled)) == found


@given(
    source=st.sampled_from(list(SCHEMES)),
    body=st.binary(max_size=200),
    where=st.integers(0, 10**6),
    other=st.characters(max_codepoint=0x2FF),
)
@settings(max_examples=500, deadline=None)
async def test_whichever_character_of_what_was_signed_is_another_it_is_not_believed(
    source: str, body: bytes, where: int, other: str
) -> None:
    headers, at = PROOFS[source](body), time.time()
    assert isinstance(await SCHEMES[source].authenticate(presented(headers, body, at=at)), Caller)
    signed = [name for name in headers if name not in UNSIGNED]
    places = [(name, at) for name in signed for at in range(len(headers[name]))]
    if body and where % 3 == 0:
        changed = bytearray(body)
        changed[where % len(body)] ^= 1 + where % 255
        forged = presented(headers, bytes(changed), at=at)
    else:
        name, place = places[where % len(places)]
        value = headers[name][:place] + other + headers[name][place + 1 :]
        if value == headers[name] or (source != "shop" and value.lower() == headers[name].lower()):
            return  # hex is the same in capitals
        forged = presented({**headers, name: value}, body, at=at)
    assert isinstance(await SCHEMES[source].authenticate(forged), Unauthorized)
