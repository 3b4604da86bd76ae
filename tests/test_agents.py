"""The events of an agent's run: what the factories make, refuse and promise."""

from __future__ import annotations

import sys

import pytest

from bus import InvalidEvent, agents
from bus.agents import (
    AgentEvent,
    HookEvent,
    ModelEvent,
    agent_run_failed,
    agent_run_finished,
    agent_run_started,
    agent_tool_called,
    agent_tool_returned,
    hook_before_model_call,
    hook_before_tool_call,
    model_content_block_delta,
    model_content_block_started,
    model_content_block_stopped,
    model_message_started,
    model_message_stopped,
)
from bus.event import info_of

RUN = [
    agent_run_started("run-1", agent="clerk", request="How late?"),
    hook_before_model_call("run-1", model="m", prompt="How late?"),
    model_message_started("run-1", message_id="m-1", model="m"),
    model_content_block_started("run-1", message_id="m-1", index=0, kind="thinking"),
    model_content_block_delta("run-1", message_id="m-1", index=0, text="Hm"),
    model_content_block_stopped("run-1", message_id="m-1", index=0),
    model_message_stopped("run-1", message_id="m-1", input_tokens=5, output_tokens=1),
    hook_before_tool_call("run-1", call_id="c-1", tool="clock", arguments={"zone": "UTC"}),
    agent_tool_called("run-1", call_id="c-1", tool="clock", arguments={"zone": "UTC"}),
    agent_tool_returned("run-1", call_id="c-1", output="12:01"),
    agent_run_finished("run-1", answer="A minute"),
    agent_run_failed("run-1", TimeoutError("no answer")),
]


def test_every_factory_makes_the_event_it_is_named_for():
    made = {info_of(event.__class__).type.replace(".", "_") for event in RUN}
    assert made == {n for n in vars(agents) if n.startswith(("agent_", "model_", "hook_"))}


@pytest.mark.parametrize("event", RUN, ids=lambda event: info_of(event.__class__).type)
def test_each_is_a_small_value_that_travels(event):
    info = info_of(event.__class__)
    assert info.decode(info.encode(event)) == event
    assert len({event, info.decode(info.encode(event))}) == 1
    assert sys.getsizeof(event) <= 72
    with pytest.raises(AttributeError):
        event.run_id = "another"


@pytest.mark.parametrize("event", RUN, ids=lambda event: info_of(event.__class__).type)
def test_what_happens_in_a_run_is_kept_in_one_order(event):
    info = info_of(event.__class__)
    base = {"agent": AgentEvent, "model": ModelEvent, "hook": HookEvent}[info.family]
    assert isinstance(event, base)
    if info.family != "hook":
        assert (info.topic, info.key) == ("agent", "run_id")


def test_arguments_are_json_text_and_equal_ones_are_equal_events():
    def called(arguments):
        return agent_tool_called("r", call_id="c", tool="t", arguments=arguments)

    assert called({"b": [1], "a": "x"}) == called('{"a": "x", "b": [1]}')
    assert called({"b": [1], "a": "x"}).arguments == '{"a":"x","b":[1]}'


@pytest.mark.parametrize("arguments", ["{", "[1]", "1", {"a": object()}, {1.5: 2, None: 3}, 5])
def test_arguments_that_are_no_json_object_are_refused(arguments):
    for factory in (agent_tool_called, hook_before_tool_call):
        with pytest.raises(InvalidEvent, match="the arguments of clock"):
            factory("r", call_id="c", tool="clock", arguments=arguments)


@pytest.mark.parametrize("index", [-1, 1.0, "0", None, True])
def test_an_index_counts_blocks(index):
    for factory in (model_content_block_delta, model_content_block_started):
        extra = {"text": ""} if factory is model_content_block_delta else {}
        with pytest.raises(InvalidEvent, match="counts the blocks"):
            factory("r", message_id="m", index=index, **extra)
    with pytest.raises(InvalidEvent, match="counts the blocks"):
        model_content_block_stopped("r", message_id="m", index=index)


def test_a_kind_of_block_is_one_of_three():
    with pytest.raises(InvalidEvent, match="'text', 'thinking' or 'tool_use', not 'audio'"):
        model_content_block_started("r", message_id="m", index=0, kind="audio")


def test_a_failure_is_named():
    failed = agent_run_failed("r", ValueError("why"))
    assert (failed.error_type, failed.error) == ("ValueError", "why")
