from __future__ import annotations

import ast
import sys
from datetime import UTC, datetime
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
    "model.message_start": ("model", "run_id"),
    "model.content_block_start": ("model", "run_id"),
    "model.content_block_delta": ("model", "run_id"),
    "model.content_block_stop": ("model", "run_id"),
    "model.metadata": ("model", "run_id"),
    "model.message_stop": ("model", "run_id"),
    "agent.run_started": ("agent", "run_id"),
    "agent.run_finished": ("agent", "run_id"),
    "agent.tool_called": ("agent", "run_id"),
    "agent.tool_returned": ("agent", "run_id"),
    "agent.error": ("agent", "run_id"),
}

STREAMED = [
    events.model_message_start("run-1", "m-1", "a-model"),
    events.model_content_block_start("run-1", 0, "thinking"),
    events.model_content_block_delta("run-1", 0, "Hel"),
    events.model_content_block_stop("run-1", 0),
    events.model_metadata("run-1", input_tokens=3, output_tokens=4, duration_ms=5),
    events.model_message_stop("run-1"),
    events.agent_run_started("run-1", "app-1", "user-1"),
    events.agent_tool_called("run-1", "call-1", "search", {"words": "event loop"}),
    events.agent_tool_returned("run-1", "call-1", "three hits", 12),
    events.agent_error("run-1", ValueError("no such tool")),
    events.agent_run_finished("run-1", 900, "failed"),
]


def declared_classes() -> list[type[Event]]:
    found = vars(events).values()
    return [c for c in found if isinstance(c, type) and issubclass(c, Event) and c is not Event]


def test_every_event_lies_in_its_topic_under_its_key() -> None:
    infos = [cls.__event_info__ for cls in declared_classes()]
    assert {i.type: (i.topic, i.key) for i in infos if i} == DECLARED


@pytest.mark.parametrize("event", STREAMED, ids=lambda event: type(event).__name__)
def test_what_a_factory_makes_survives_the_wire(event: Event) -> None:
    info = type(event).__event_info__
    assert info is not None
    assert info.decode(info.encode(event)) == event
    assert getattr(event, info.key or "") == "run-1"


def test_the_streaming_families_have_a_factory_each() -> None:
    families = {i.type for c in declared_classes() if (i := c.__event_info__)}
    streaming = {t for t in families if t.startswith(("model.", "agent."))}
    made = {i.type for event in STREAMED if (i := type(event).__event_info__)}
    assert made == streaming


def test_what_tools_produce_is_cut_to_size() -> None:
    called = events.agent_tool_called("r", "c", "write", {"text": "x" * 10_000})
    assert (len(called.arguments), called.truncated) == (events.EXCERPT_CHARS, True)
    returned = events.agent_tool_returned("r", "c", "y" * 10_000, 1)
    assert (len(returned.result), returned.truncated) == (events.EXCERPT_CHARS, True)
    assert len(events.agent_error("r", ValueError("z" * 10_000)).message) == events.EXCERPT_CHARS


def test_tool_arguments_that_json_does_not_know_are_shown() -> None:
    at = datetime(2026, 11, 20, tzinfo=UTC)
    called = events.agent_tool_called("r", "c", "wait", {"until": at, "who": "Zoë"})
    assert called.arguments == '{"until": "2026-11-20 00:00:00+00:00", "who": "Zoë"}'
    assert not called.truncated


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
