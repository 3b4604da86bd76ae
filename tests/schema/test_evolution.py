"""What docs/evolution.md shows is run as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.test_docs import ROOT, blocks

if TYPE_CHECKING:
    from pathlib import Path

TEXT = (ROOT / "docs/evolution.md").read_text(encoding="utf-8")
CODE = blocks(TEXT)
BEFORE = """
from bus import Event

class DocumentCreated(Event, type="document.created", key="document_id"):
    document_id: str
    name: str
"""
USES = """
import events
from bus.event import find, info_of
from bus.streams.codec import open_envelope

def read(data, *version):
    entry = [b"id", b"i", b"type", b"document.created", b"data", data, *version]
    return open_envelope("bus:{document:0}", b"1-0", entry).event
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A program with the first version of the event, whose schema is exported."""
    (tmp_path / "schemas.py").write_text(CODE["check"], encoding="utf-8")
    (tmp_path / "events.py").write_text(BEFORE, encoding="utf-8")
    assert run(tmp_path, "schemas.py", "schemas", "export") == (0, "")
    return tmp_path


def run(project: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def release(project: Path, code: str, uses: str = "") -> tuple[int, str]:
    """Let the program have these events, and run what uses them."""
    (project / "events.py").write_text(code, encoding="utf-8")
    (project / "uses.py").write_text(USES + uses, encoding="utf-8")
    return run(project, "uses.py")


def test_every_block_of_python_is_run() -> None:
    assert TEXT.count("```python") == len(CODE.keys() - {"said"}) == 5


@pytest.mark.parametrize("change", ["additive", "renamed"])
def test_what_needs_no_new_version(project: Path, change: str) -> None:
    uses = """print(read(b'{"document_id":"d","name":"Cats"}'))"""
    field = "name" if change == "additive" else "title"
    shown = f"DocumentCreated(document_id='d', {field}='Cats', language='en')\n"
    assert release(project, CODE[change], uses) == (0, shown)
    code, said = run(project, "schemas.py", "schemas")
    assert code == 0
    assert "is not up to date: run export" in said


def test_a_new_version_and_its_step(project: Path) -> None:
    uses = """
print(read(b'{"document_id":"d","name":"Cats","language":"de"}'))
print(read(b'{"document_id":"d","name":"Dogs"}'))
events.test_a_document_of_old()
"""
    code, shown = release(project, CODE["upcast"], uses)
    assert code == 0
    assert shown.splitlines() == [
        "DocumentCreated(document_id='d', title='Cats', languages=('de',))",
        "DocumentCreated(document_id='d', title='Dogs', languages=('en',))",
    ]
    code, said = run(project, "schemas.py", "schemas")
    assert code == 0
    assert "old readers park its entries until they are deployed, at most 24 hours" in said
    without = re.sub(r"@upcast.*?\n", "", CODE["upcast"])
    release(project, without)
    code, said = run(project, "schemas.py", "schemas")
    assert code == 1
    assert "Write @upcast(DocumentCreated, from_version=1)" in said


def test_two_deployments(project: Path) -> None:
    uses = """
old = events.DocumentNamed(document_id="d", name="Cats")
print(read(info_of(events.DocumentNamed).encode(old)))
"""
    code, shown = release(project, CODE["beside"], uses)
    assert (code, shown) == (0, "DocumentCreated(document_id='d', title='Cats')\n")
    code, said = run(project, "schemas.py", "schemas")
    assert code == 0
    assert "nothing breaks" in said, "what is still published is what it was"
    head, _, rest = re.split(r"(?=class Document)", CODE["beside"])
    uses = """print(read(b'{"document_id":"d","name":"Cats"}'))"""
    assert release(project, head + rest, uses) == (0, shown)
    assert run(project, "schemas.py", "schemas")[0] == 0


def test_the_check_says_what_the_document_says(project: Path) -> None:
    release(project, BEFORE.replace("name: str", "title: str"))
    assert run(project, "schemas.py", "schemas") == (1, CODE["said"])
    run(project, "schemas.py", "schemas", "export")
    code, _ = run(project, "schemas.py", "schemas")
    assert code == 0, "as the document warns: an exported break is one no more"
