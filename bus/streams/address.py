"""Where the server is: a URL, parsed and checked without touching the network."""

import os
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from bus.config import checked_name
from bus.errors import DeclarationError, NotSupported

DEFAULT_URL = "redis://localhost:6379/0"
VARIABLES = ("BUS_URL", "REDIS_URL")  # of the environment; the first that is set
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL. `repr` and `redacted` never show the password."""

    scheme: str
    host: str = "localhost"
    port: int = 6379
    path: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: tuple[tuple[str, str], ...] = ()

    @property
    def redacted(self) -> str:
        """The URL without its password."""
        if self.scheme == "memory":
            return f"memory://{self.path}"
        user = f"{self.username or ''}:***@" if self.password else ""
        where = self.path if self.scheme == "unix" else f"{self.host}:{self.port}/{self.db}"
        return f"{self.scheme}://{user}{where}"


def url_of_environment() -> str:
    """Return the URL for those who name none."""
    return next((url for v in VARIABLES if (url := os.environ.get(v))), DEFAULT_URL)


def shared_url(url: str | None) -> str | None:
    """Return the URL for a program of its own, None for the default; memory:// is none.

    Errors: NotSupported.
    """
    if (url or url_of_environment()).startswith("memory://"):
        raise NotSupported(
            "memory:// lives within one process: this program would see an empty one of its own;"
            " name a server, `python -m bus.embedded` starts one"
        )
    return url


def parse_url(url: str) -> Address:
    """Parse `redis://`, `rediss://`, `unix://` or `memory://`. Never touches the network.

    redis://[user:password@]host[:port][/db], rediss:// the same over TLS with the options
    ssl_ca_certs, ssl_certfile, ssl_keyfile, unix://[user:password@]/path[?db=n], memory://[name].
    Errors: NotSupported for schemes of later releases, DeclarationError for anything else wrong.
    """
    if not isinstance(url, str) or "://" not in url:
        raise DeclarationError("the URL has no scheme; say for example redis://localhost:6379/0")
    if url.startswith("memory://"):
        return _memory(url.removeprefix("memory://"))
    parts, port = _split(url)
    scheme = parts.scheme
    if "@" in parts.path + parts.query + parts.fragment:  # it may be the rest of a password
        raise DeclarationError(
            "the URL has an '@' too late: write # ? / @ of a password as %23 ..."
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    allowed = {"db"} if scheme != "rediss" else {"db", *TLS_OPTIONS}
    for name in options.keys() - allowed:
        raise DeclarationError(
            f"URL option {name!r} is not known for {scheme}://; known: {', '.join(sorted(allowed))}"
        )
    if scheme == "unix":
        database = options.get("db", "0")
        if not parts.path or parts.path == "/":
            raise DeclarationError("a unix:// URL names a socket: unix:///run/redis.sock")
    else:
        database = parts.path.strip("/") or options.get("db", "0")
    if not (database.isascii() and database.isdigit()):
        raise DeclarationError("the database in the URL is not a number")
    return Address(
        scheme=scheme,
        host=parts.hostname or "localhost",
        port=port or 6379,
        path=unquote(parts.path) if scheme == "unix" else "",
        db=int(database),
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=tuple((k, v) for k, v in options.items() if k in TLS_OPTIONS),
    )


def _split(url: str) -> tuple[SplitResult, int | None]:
    """Return the parts of the URL of a server, and its port."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise DeclarationError("the URL cannot be parsed: check port and brackets") from None
    scheme = parts.scheme
    if scheme in ("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"):
        raise NotSupported(f"{scheme}:// is not part of this release")
    if scheme not in ("redis", "rediss", "unix"):
        raise DeclarationError(
            f"{scheme}:// is no known scheme: use redis://, rediss:// (TLS), unix:// or memory://"
        )
    return parts, port


def _memory(name: str) -> Address:
    return Address("memory", path=checked_name(name, "name in memory://") if name else "")
