from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import handlers
from bus import Event
from handlers import events

PACKAGE = Path(handlers.__file__).parent

DECLARED = {
    "app.created": ("app", "app_id"),
    "app.updated": ("app", "app_id"),
    "app.deleted": ("app", "app_id"),
    "dataset.created": ("dataset", "dataset_id"),
    "dataset.deleted": ("dataset", "dataset_id"),
    "dataset.document_added": ("document", "document_id"),
    "document.created": ("document", "document_id"),
    "document.updated": ("document", "document_id"),
    "document.deleted": ("document", "document_id"),
    "document.indexed": ("document", "document_id"),
    "document.index_failed": ("document", "document_id"),
    "message.created": ("message", "user_id"),
    "quota.granted": ("message", "user_id"),
    "quota.exceeded": ("message", "user_id"),
}


def declared_classes() -> list[type[Event]]:
    found = vars(events).values()
    return [c for c in found if isinstance(c, type) and issubclass(c, Event) and c is not Event]


def test_every_event_lies_in_its_topic_under_its_key() -> None:
    infos = [cls.__event_info__ for cls in declared_classes()]
    assert {i.type: (i.topic, i.key) for i in infos if i} == DECLARED


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_the_application_imports_from_bus_what_any_program_could(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            first = module.partition(".")[0]
            assert module == "bus" or first == "handlers" or first in sys.stdlib_module_names, (
                f"{path.name} imports {module}"
            )
