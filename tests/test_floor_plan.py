"""Which way imports point, and other things that keep the house as it was planned.

The reasons: the vocabulary at the top is pure, so it can be tested and understood with no server;
only `streams/` speaks Redis, so another server topology or a bus without one enters there alone;
the way in, the way out and the way back know nothing of each other; the facade wires and nothing
below may know it; optional things sit at the bottom, and nobody needs them to work.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bus"

# From the upper floor to the lower; a module may import from its own floor and those above it.
FLOORS = [
    # vocabulary: pure, no I/O
    (
        "event envelope topic delivery handler signature backoff breaker errors config telemetry"
        " effects reply scope upcasts raw agents"
    ),
    "schema",  # the events told in JSON Schema, as files
    "streams",  # everything that speaks Redis
    # the way in
    (
        "publisher sender appender batch unit shortage causes committer transaction hooks"
        " observers way_in threads local closing"
    ),
    "worker",  # the way out
    "history",  # looking back
    "channels",  # streams that live as long as a run: both ways
    "admin",  # seeing to it: what an operator does
    "outbox",  # the extra for SQL
    "bus",  # the facade: wiring and one-line delegations
    "embedded testing",  # servers and fakes for those who try it out
    "instrument launcher stdio web cli __main__ pytest_plugin",  # attached from outside
]
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts.split()}

# `bus/__init__.py` gives the public names and may import anything; nothing inside imports it.
EXEMPT = {"bus/__init__.py"}
# Pure means: no client, no sockets, no event loop of its own.
IMPURE = {"asyncio", "hiredis", "redis", "select", "socket", "subprocess", "tenacity", "uvloop"}
# Only its own file may import an optional library.
OPTIONAL = {
    "cyclopts",
    "fastapi",
    "opentelemetry",
    "prometheus_client",
    "pytest",
    "rich",
    "simpleeval",
    "sqlalchemy",
    "sse_starlette",
    "starlette",
    "structlog",
}
# Drawers into which anything fits.
DRAWERS = {"utils", "util", "common", "base", "helpers", "helper", "manager", "misc"}
LONGEST = 460  # lines; a file that needs more is two files
FACADES = {"bus/bus.py": 450, "worker.py": 100}  # what rots first in projects of this kind


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(text: str) -> list[tuple[int, str, str]]:
    """Return (line, module, name) of every import, wherever in the file it stands."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(node.lineno, module, alias.name) for alias in node.names]
    return found


def part_of(module: str, name: str) -> str:
    """Return the part of the package that an import reaches: `from bus import event` is `event`."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] or name


def upward(path: Path, text: str) -> list[str]:
    """Return the imports in `path` that point to a lower floor, or to the package itself."""
    own = FLOOR_OF[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    wrong = []
    for line, module, name in imports(text):
        if module.split(".")[0] != "bus":
            continue
        part = part_of(module, name)
        if FLOOR_OF.get(part, len(FLOORS)) > own:
            wrong.append(f"{shown(path)}:{line} imports {module}.{name}".rstrip("."))
    return wrong


@pytest.mark.parametrize("path", files(PACKAGE), ids=shown)
def test_imports_point_from_the_lower_floors_to_the_upper(path):
    if shown(path) not in EXEMPT:
        assert upward(path, path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "from bus.worker.consumer import Consumer",
        "import bus.worker",
        "from bus import worker",
        "from bus import Bus",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bus.bus import Bus",
        "def late():\n    from bus.publisher import Publisher",
    ],
)
def test_the_test_sees_an_import_wherever_it_hides(text):
    assert upward(PACKAGE / "streams" / "stream.py", text)


def test_every_module_has_its_floor():
    parts = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in files(PACKAGE)}
    assert parts - {"__init__"} <= set(FLOOR_OF)


def test_no_two_modules_need_each_other():
    """Also within one floor: a cycle is one module in two files."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files(PACKAGE)}
    needs = {
        name: {
            target
            for _, module, what in imports(path.read_text())
            for target in (module, f"{module}.{what}")
            if target in names and target != name
        }
        for name, path in names.items()
        if shown(path) not in EXEMPT
    }
    while free := {n for n, targets in needs.items() if not targets & set(needs)}:
        for name in free:
            del needs[name]
    assert needs == {}


@pytest.mark.parametrize("part", FLOORS[0].split())
def test_the_vocabulary_is_pure(part):
    used = {m.split(".")[0] for _, m, _ in imports((PACKAGE / f"{part}.py").read_text())}
    assert not used & IMPURE


@pytest.mark.parametrize("path", files(PACKAGE), ids=shown)
def test_the_core_knows_no_optional_library(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if FLOOR_OF.get(part, 0) < FLOOR_OF["instrument"]:
        used = {m.split(".")[0] for _, m, _ in imports(path.read_text())}
        assert not used & OPTIONAL


def test_one_file_speaks_stream_commands():
    """`server.py` probes with one, to see whether the server is new enough.

    `effects.py` writes one down, for the script that applies effects.
    `rights.py` has all of them queued and thrown away, to see which the user may run.
    `memory/` answers those that look, and appends where effects do.
    """
    verbs = {"XADD", "XREADGROUP", "XACK", "XCLAIM", "XAUTOCLAIM", "XPENDING", "XGROUP", "XINFO"}
    verbs |= {"XRANGE", "XREVRANGE", "XTRIM", "XDEL", "XLEN", "XREAD"}
    speakers = {
        shown(path)
        for path in files(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in verbs
    }
    parts = ("stream", "reader", "doorbell", "leases", "archive", "follower")
    parts += ("inspection", "overview", "server", "upkeep", "rights", "checkup", "channels")
    parts += ("memory/looks", "memory/connection", "memory/reader")
    assert speakers == {f"bus/streams/{part}.py" for part in parts} | {"bus/effects.py"}


def test_one_file_makes_key_names():
    makers = {
        shown(path)
        for path in files(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith(("bus:", ":dead", ":lease", ":sweep", ":pub"))
    }
    assert makers == {"bus/streams/keys.py"}


@pytest.mark.parametrize("path", files(ROOT / "handlers"), ids=shown)
def test_the_application_imports_only_the_public_names(path):
    wrong = [
        f"{shown(path)}:{line} imports {module}"
        for line, module, _ in imports(path.read_text())
        if module.split(".")[0] == "bus" and module != "bus"
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ["bus", "handlers", "demo", "bench"])
def test_no_module_is_a_drawer(folder):
    names = {part.removesuffix(".py") for p in files(ROOT / folder) for part in p.parts}
    assert not names & DRAWERS


@pytest.mark.parametrize("path", [*files(PACKAGE), ROOT / "worker.py"], ids=shown)
def test_no_file_outgrows_its_reader(path):
    lines = len(path.read_text().splitlines())
    assert lines <= FACADES.get(shown(path), LONGEST)
