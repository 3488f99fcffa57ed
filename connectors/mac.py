"""HMAC (RFC 2104) under a key that is taken in once."""

import hashlib


class Mac:
    """Its two hashes have begun with the key and are copied for each message.

    `hmac` keeps them too, but its own `copy` costs three times as much.
    """

    def __init__(self, key: bytes, algorithm: str = "sha256") -> None:
        self._inner, self._outer = hashlib.new(algorithm), hashlib.new(algorithm)
        if len(key) > self._inner.block_size:
            key = hashlib.new(algorithm, key).digest()
        block = key.ljust(self._inner.block_size, b"\0")
        self._inner.update(bytes(byte ^ 0x36 for byte in block))
        self._outer.update(bytes(byte ^ 0x5C for byte in block))

    def of(self, message: bytes) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.digest()
