"""Odoo's own webhook: unsigned, with a secret at the end of the URL and nothing else.

Odoo writes that URL into its log, so whoever reads the log can post.  What comes this way is a hint.
"""

from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized
from gateway.config_sections import OdooNative


class OdooNativeScheme:
    def __init__(self, source: OdooNative) -> None:
        self._token = source.token

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        if presented.token is None:
            return Unauthorized(Reason.MISSING_TOKEN)
        if not self._token.matches(presented.token.encode(errors="surrogatepass")):
            return Unauthorized(Reason.WRONG_TOKEN)
        return Caller(signed_id=None, secret=0)

    async def close(self) -> None:
        """Holds nothing."""
