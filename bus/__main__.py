"""The command `bus`, also as `python -m bus`: what it can do is in the extra `cli`."""

import sys
from importlib.util import find_spec

from bus.stdio import prepare

_NEEDED = ("cyclopts", "rich", "simpleeval")
_UNAVAILABLE = 69


def main() -> int:
    """Run the command line; return its exit code, 69 where the extra is not installed."""
    prepare()
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(  # noqa: T201 - it is a program
            f"the command line needs {', '.join(missing)}, which is not installed here:"
            " pip install 'bus-streams[cli]'",
            file=sys.stderr,
        )
        return _UNAVAILABLE
    from bus.cli.app import run  # noqa: PLC0415 - only with the extra

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
