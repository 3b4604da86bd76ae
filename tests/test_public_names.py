"""What `from bus import ...` offers: one table, its stub, and nothing imported too soon."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import bus

PACKAGE = Path(bus.__file__).parent
STUB = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
TABLE = {home: set(names.split()) for home, names in bus._HOMES.items()}


def run(program: str) -> str:
    """Run it in an interpreter of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_and_the_stub_name_the_same():
    imported: dict[str, set[str]] = defaultdict(set)
    for node in STUB.body:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            imported[node.module.removeprefix("bus.")].update(a.name for a in node.names)
            assert all(a.asname is None for a in node.names)
    assert imported == TABLE


def test_all_is_the_table_in_code_and_stub():
    (listed,) = [
        [element.value for element in node.value.elts]  # type: ignore[attr-defined] # constants
        for node in STUB.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(bus.__all__) == set().union(*TABLE.values())
    assert sum(map(len, TABLE.values())) == len(bus.__all__), "each has one home"


@pytest.mark.parametrize("name", bus.__all__)
def test_every_name_is_the_one_of_its_home(name):
    value = getattr(bus, name)
    assert value is getattr(bus, name)
    (home,) = [h for h, names in TABLE.items() if name in names]
    assert value is vars(sys.modules[f"bus.{home}"])[name]
    assert getattr(value, "__module__", "bus").startswith("bus")


def test_each_can_be_the_first_that_is_imported():
    """In any order: no module may rely on another name having been asked for before."""
    run(
        "import os, sys, redis.asyncio, hiredis, msgspec, tenacity\n"
        "import bus\n"
        "for home, names in bus._HOMES.items():\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        exec(f'from bus import {\", \".join(names.split())}')\n"
        "        os._exit(0)\n"
        "    if os.waitpid(child, 0)[1]:\n"
        "        sys.exit(f'from bus.{home} nothing can be imported first')\n"
    )


def test_importing_the_package_imports_nothing_that_is_slow():
    program = (
        "import sys\nbefore = set(sys.modules)\nimport bus\n"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    there = set(run(program).split())
    slow = {"redis", "hiredis", "asyncio", "msgspec", "tenacity", "uvloop", "ssl", "socket"}
    assert "bus" in there
    assert not there & slow


def test_a_module_that_declares_events_and_handlers_needs_no_client():
    program = (
        "import sys\nfrom bus import Backoff, Event, Reject, RetryLater, Topic, event_handler\n"
        "class Done(Event, type='a.done'):\n    n: int\n"
        "@event_handler(Done, group='g')\nasync def handle(event): ...\n"
        "print(*sys.modules)"
    )
    there = {name.partition(".")[0] for name in run(program).split()}
    assert not there & {"redis", "hiredis", "uvloop"}


def test_a_name_that_there_is_not_is_told_as_of_any_module():
    with pytest.raises(AttributeError, match="module 'bus' has no attribute 'Buss'"):
        bus.Buss  # noqa: B018 - it is asked for
    assert not hasattr(bus, "Buss")
    names: dict[str, Any] = {}
    with pytest.raises(ImportError, match="cannot import name 'Buss' from 'bus'"):
        exec("from bus import Buss", names)  # noqa: S102 - as a user writes it


def test_a_star_and_dir_give_all_of_them():
    names: dict[str, Any] = {}
    exec("from bus import *", names)  # noqa: S102 - as a user writes it
    assert set(bus.__all__) <= set(names)
    assert set(bus.__all__) <= set(dir(bus))
    assert {"__doc__", "__file__"} <= set(dir(bus))


def test_modules_are_modules_whatever_was_imported_before():
    """A public name and a module may differ in their first letter alone."""
    for first, then in (("bus.bus", "Bus"), ("Bus", "bus.bus"), ("bus.topic", "Topic")):
        program = "\n".join(
            f"import {name}" if "." in name else f"from bus import {name}" for name in (first, then)
        )
        out = run(
            f"{program}\nimport sys, bus.bus\nprint(bus.bus is sys.modules['bus.bus'], bus.Bus)"
        )
        assert out == "True <class 'bus.bus.Bus'>\n"
