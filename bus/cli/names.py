r"""Names of groups and consumers, which others may have made of any bytes.

What is no text is shown as `receipts\xff`, and may be said so, too.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

from bus.history.backlog import name_of
from bus.streams.keys import text, wire

_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")


def said(name: str) -> str:
    """Return a name as the library has it, of how it was said."""
    return text(_ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), wire(name)))


def shown(name: str) -> str:
    """Return a name of the library as it is shown."""
    return name_of(wire(name))


def _converted(_: Any, tokens: Sequence[Token]) -> str:
    return said(tokens[0].value)


Name = Annotated[str, Parameter(converter=_converted)]
