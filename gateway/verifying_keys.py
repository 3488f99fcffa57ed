"""Keys that verify signatures, each with the one algorithm (RFC 9421) that it is for.  Pure."""

import hashlib
import hmac
from typing import Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_public_key


class VerifyingKey(Protocol):
    algorithm: str

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` is one of `message`; never raises, whatever is in it."""
        ...


def verifying_key(text: str) -> VerifyingKey:
    """A public key in PEM, or else a secret that is shared; a ValueError with the rest of a sentence that says the mend."""
    if "-----BEGIN" not in text:
        if len(text.encode()) < LEAST:
            raise ValueError(f"has {len(text.encode())} bytes, which can be guessed; use at least {LEAST} random ones")
        return SharedSecret(text.encode())
    if "PRIVATE KEY-----" in text:
        raise ValueError("holds a private key, which is the sender's alone; give only its public half")
    try:
        key = load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("is no public key in PEM; it begins with -----BEGIN PUBLIC KEY-----") from None
    match key:
        case ed25519.Ed25519PublicKey():
            return Ed25519(key)
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1()):
            return EcdsaP256(key)
        case rsa.RSAPublicKey(key_size=bits) if bits >= LEAST_RSA:
            return RsaPss(key)
        case rsa.RSAPublicKey(key_size=bits):
            raise ValueError(f"is an RSA key of {bits} bits, which can be broken; use at least {LEAST_RSA}")
        case _:
            raise ValueError("is of a kind that is not known here; use Ed25519, ECDSA with P-256, or RSA")


class Ed25519:
    algorithm = "ed25519"

    def __init__(self, key: ed25519.Ed25519PublicKey) -> None:
        self._key = key

    def verifies(self, signature: bytes, message: bytes) -> bool:
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


class EcdsaP256:
    algorithm = "ecdsa-p256-sha256"

    def __init__(self, key: ec.EllipticCurvePublicKey) -> None:
        self._key = key

    def verifies(self, signature: bytes, message: bytes) -> bool:
        if len(signature) != 64:
            return False
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
        try:
            self._key.verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True


class RsaPss:
    algorithm = "rsa-pss-sha512"

    def __init__(self, key: rsa.RSAPublicKey) -> None:
        self._key = key

    def verifies(self, signature: bytes, message: bytes) -> bool:
        try:
            self._key.verify(signature, message, padding.PSS(padding.MGF1(hashes.SHA512()), 64), hashes.SHA512())
        except InvalidSignature:
            return False
        return True


class SharedSecret:
    algorithm = "hmac-sha256"

    def __init__(self, key: bytes) -> None:
        self._key = key

    def sign(self, message: bytes) -> bytes:
        return hmac.digest(self._key, message, hashlib.sha256)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        return hmac.compare_digest(self.sign(message), signature)


LEAST = 32  # bytes of a secret that is shared, as long as the hash
LEAST_RSA = 2048
