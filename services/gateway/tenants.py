"""Who may ask, and as which tenant: the API keys of a file, and the key that a request brings."""

import hashlib
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from common.errors import ConfigError, Unauthenticated

MAX_FILE_BYTES = 2**20
# Each tenant is a series of every metric that is told by tenant.
MAX_TENANTS = 256
# A key that can be guessed is none.
MIN_KEY_CHARS, MAX_KEY_CHARS = 16, 512
HASHED = "sha256:"
SCHEME = "bearer"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(rf"[!-~]{{{MIN_KEY_CHARS},{MAX_KEY_CHARS}}}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_HOW = "send 'Authorization: Bearer KEY'"


class Tenants:
    """The tenants and their keys. Without a file there is one tenant, '', and no key is asked for.

    keys  SHA-256 of an API key: the tenant that it belongs to; None when there is no file
    """

    def __init__(self, keys: dict[bytes, str] | None = None) -> None:
        self.names = tuple(sorted(set((keys or {}).values())))
        # Found by a keyed hash of its own: what the time of a lookup tells, of how far two values
        # agree, is about values that nobody outside can know or choose.
        self._secret = secrets.token_bytes(32)
        self._tenant_of = {self._blind(digest): name for digest, name in (keys or {}).items()}
        self._open = keys is None

    def tenant_of(self, authorization: str | None) -> str:
        """The tenant whose key an Authorization header brings; its content is never told.

        Raises Unauthenticated.
        """
        if self._open:
            return ""
        if not authorization:
            raise Unauthenticated(f"no API key was given; {_HOW}")
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != SCHEME:
            raise Unauthenticated(f"the Authorization header has another scheme; {_HOW}")
        # Header bytes that are no UTF-8 arrive as surrogates.
        given = key.strip().encode(errors="surrogateescape")
        tenant = self._tenant_of.get(self._blind(hashlib.sha256(given).digest()))
        if tenant is None:
            raise Unauthenticated(f"the API key is not known here; {_HOW} with a key that is")
        return tenant

    def _blind(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()


def read_tenants(path: Path | None) -> Tenants:
    """The tenants of a file of lines `TENANT KEY` or `TENANT sha256:HEX`; empty lines and those
    that begin with # are left out. A tenant may have several keys, each on a line of its own.

    Raises ConfigError, which names the line and never tells a key.
    """
    if path is None:
        return Tenants()
    keys: dict[bytes, str] = {}
    lines: dict[bytes, int] = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        digest, name = _parse(where, line)
        if digest in keys:
            raise ConfigError(f"{where}: this is the key of line {lines[digest]}; make another one")
        keys[digest], lines[digest] = name, number
    if not keys:
        raise ConfigError(
            f"{path} holds no key, and nobody could ask anything; give it lines of TENANT KEY, "
            "or leave --api-keys-file out"
        )
    tenants = Tenants(keys)
    if len(tenants.names) > MAX_TENANTS:
        raise ConfigError(f"{path} has {len(tenants.names)} tenants; at most {MAX_TENANTS}")
    return tenants


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"--api-keys-file {path} cannot be read ({error.strerror}); name a file of lines "
            "TENANT KEY that this process may read"
        ) from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is over {MAX_FILE_BYTES} bytes; is it a file of API keys?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; is it a file of API keys?") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _parse(where: str, line: str) -> tuple[bytes, str]:
    name, *rest = line.split()
    if not _NAME.fullmatch(name):
        # Not shown: where the order is wrong, it is the key.
        raise ConfigError(
            f"{where}: the tenant's name comes first; it is made of 1 to 64 letters, digits, "
            "dots, dashes and underscores"
        )
    if len(rest) != 1:
        raise ConfigError(
            f"{where}: {len(rest)} words follow the tenant {name!r}; one key belongs there"
        )
    (key,) = rest
    if key.startswith(HASHED):
        hexadecimal = key.removeprefix(HASHED)
        if not _SHA256.fullmatch(hexadecimal):
            raise ConfigError(
                f"{where}: what follows {HASHED} is not 64 hexadecimal digits; make them with "
                "printf %s KEY | sha256sum"
            )
        return bytes.fromhex(hexadecimal), name
    if not _KEY.fullmatch(key):
        raise ConfigError(
            f"{where}: the key of {name!r} is not {MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable "
            "ASCII characters; openssl rand -hex 24 makes one"
        )
    return hashlib.sha256(key.encode()).digest(), name
