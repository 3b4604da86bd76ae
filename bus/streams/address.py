"""Where the server is: a URL, parsed and checked without touching the network."""

from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from bus.errors import DeclarationError, NotSupported

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
        user = f"{self.username or ''}:***@" if self.password else ""
        where = self.path if self.scheme == "unix" else f"{self.host}:{self.port}/{self.db}"
        return f"{self.scheme}://{user}{where}"


def parse_url(url: str) -> Address:
    """Parse `redis://`, `rediss://` or `unix://`. Never touches the network.

    redis://[user:password@]host[:port][/db], rediss:// the same over TLS with the options
    ssl_ca_certs, ssl_certfile, ssl_keyfile, unix://[user:password@]/path[?db=n].
    Errors: NotSupported for schemes of later releases, DeclarationError for anything else wrong.
    """
    if not isinstance(url, str) or "://" not in url:
        raise DeclarationError("the URL has no scheme; say for example redis://localhost:6379/0")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise DeclarationError("the URL cannot be parsed: check port and brackets") from None
    scheme = parts.scheme
    if scheme in ("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster", "memory"):
        raise NotSupported(f"{scheme}:// is not part of this release")
    if scheme not in ("redis", "rediss", "unix"):
        raise DeclarationError(
            f"{scheme}:// is no known scheme: use redis://, rediss:// (TLS) or unix://"
        )
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
