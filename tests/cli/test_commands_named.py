"""Every command that a document, a help text or a finding names can be typed as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bus.cli.app import COMMANDS, tree
from tests.cli.test_app import VERBS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/operations.md", "docs/command-line.md", "docs/evolution.md"]
# At a prompt, in a line of its own in a help text, or in back quotes.
_NAMED = re.compile(r"(?:^\$ |^ {6}|`)(bus [a-z][^`\n]*)", re.MULTILINE)


def named() -> list[str]:
    found = []
    for page in PAGES:
        found += _NAMED.findall((ROOT / page).read_text(encoding="utf-8"))
    for module in sorted((ROOT / "bus/cli").glob("*.py")):
        found += _NAMED.findall(module.read_text(encoding="utf-8"))
    return sorted(set(found))


@pytest.mark.parametrize("command", named())
def test_it_is_understood(command: str) -> None:
    """What is only named must exist; what has options must be taken as it is."""
    words = shlex.split(command.partition(" | ")[0].partition(" #")[0])[1:]
    assert words[0] in [name for name, *_ in COMMANDS]
    if words[0] in VERBS and len(words) > 1:
        assert words[1] in VERBS[words[0]]
    if any(word.startswith("-") for word in words[1:]):
        tree(words[0]).parse_args(words, exit_on_error=False, print_error=False)


def test_there_are_many() -> None:
    assert len(named()) > 30
