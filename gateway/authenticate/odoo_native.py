"""Odoo's own webhook: unsigned, with a secret at the end of the URL and nothing else.

Odoo writes that URL into its log, so whoever reads the log can post.  What comes this way is a hint.
"""

from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized
from gateway.authenticate.timed_keys import TimedKeys
from gateway.config_sections import OdooNative, TimedSecret


class OdooNativeScheme:
    def __init__(self, source: OdooNative) -> None:
        self._tokens = TimedKeys((TimedSecret(secret=source.token), *source.others), lambda secret: secret)

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        if presented.token is None:
            return Unauthorized(Reason.MISSING_TOKEN)
        given = presented.token.encode(errors="surrogatepass")
        verified: int | None = None
        for place, token in self._tokens.active(presented.at):
            if token.matches(given) and verified is None:
                verified = place
        if verified is None:
            return Unauthorized(Reason.WRONG_TOKEN)
        return Caller(signed_id=None, secret=verified)

    async def close(self) -> None:
        """Holds nothing."""
