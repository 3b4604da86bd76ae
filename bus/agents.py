"""What happens in the run of an agent, as events: a small vocabulary to take or to learn from.

    await bus.publish(agent_run_started("run-42", agent="clerk", request="How late are we?"))
    await bus.publish(model_content_block_delta("run-42", message_id="m-1", index=0, text="Not"))

| family | when | kept in |
|---|---|---|
| `agent.` | a run and its tool calls begin and end | topic `agent` |
| `model.` | a message arrives from the model, piece by piece | topic `agent`, too |
| `hook.`  | before a step is taken: may it be? for `bus.intervene` | nowhere: never published |

`agent.` and `model.` events share a topic and are keyed by their run: those of one run are in one
partition, in the order in which they were published. Every event is a small frozen value without
containers. What has no fixed shape, as the arguments of a tool, is JSON text.

Nothing in the bus needs this module; its types are known to a process once it has imported it.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from bus.errors import InvalidEvent
from bus.event import Event

BlockKind = Literal["text", "thinking", "tool_use"]


class AgentEvent(Event, family="agent", topic="agent", key="run_id"):
    """Base of what happens to a run. run_id: of the run, the key."""

    run_id: str


class ModelEvent(Event, family="model", topic="agent", key="run_id"):
    """Base of what comes from the model. message_id: of the message, unique in its run."""

    run_id: str
    message_id: str


class HookEvent(Event, family="hook"):
    """Base of what is asked before a step is taken, by `bus.intervene`; never published."""

    run_id: str


# --- a run


class AgentRunStarted(AgentEvent, type="agent.run_started"):
    """A run has begun."""

    agent: str
    request: str


class AgentRunFinished(AgentEvent, type="agent.run_finished"):
    """A run has ended, with an answer."""

    answer: str


class AgentRunFailed(AgentEvent, type="agent.run_failed"):
    """A run has ended, without one."""

    error_type: str
    error: str


class AgentToolCalled(AgentEvent, type="agent.tool_called"):
    """A tool is called."""

    call_id: str
    tool: str
    arguments: str


class AgentToolReturned(AgentEvent, type="agent.tool_returned"):
    """A tool has answered, or failed."""

    call_id: str
    output: str
    failed: bool = False


def agent_run_started(run_id: str, *, agent: str, request: str) -> AgentRunStarted:
    """Return the event that a run has begun.

    run_id: unique among runs. agent: which one. request: what it was asked to do.
    """
    return AgentRunStarted(run_id=run_id, agent=agent, request=request)


def agent_run_finished(run_id: str, *, answer: str = "") -> AgentRunFinished:
    """Return the event that a run has ended well. answer: its last word, whole."""
    return AgentRunFinished(run_id=run_id, answer=answer)


def agent_run_failed(run_id: str, error: BaseException) -> AgentRunFailed:
    """Return the event that a run was ended by `error`: the name of its class, and its text."""
    return AgentRunFailed(run_id=run_id, error_type=type(error).__name__, error=str(error))


def agent_tool_called(
    run_id: str, *, call_id: str, tool: str, arguments: Mapping[str, Any] | str
) -> AgentToolCalled:
    """Return the event that a tool is called.

    call_id: unique in the run. tool: its name. arguments: a mapping, or a JSON object as text.
    Errors: InvalidEvent when the arguments are neither.
    """
    return AgentToolCalled(
        run_id=run_id, call_id=call_id, tool=tool, arguments=_json_text(arguments, tool)
    )


def agent_tool_returned(
    run_id: str, *, call_id: str, output: str, failed: bool = False
) -> AgentToolReturned:
    """Return the event that a tool has answered.

    call_id: as in `agent_tool_called`. output: what the model is told; the error if it has failed.
    """
    return AgentToolReturned(run_id=run_id, call_id=call_id, output=output, failed=failed)


# --- a message from the model


class ModelMessageStarted(ModelEvent, type="model.message_started"):
    """The model begins to answer."""

    model: str


class ModelContentBlockStarted(ModelEvent, type="model.content_block_started"):
    """A block of the message begins."""

    index: int
    kind: BlockKind


class ModelContentBlockDelta(ModelEvent, type="model.content_block_delta"):
    """A piece of a block: what is to be put behind what came before."""

    index: int
    text: str


class ModelContentBlockStopped(ModelEvent, type="model.content_block_stopped"):
    """A block is whole."""

    index: int


class ModelMessageStopped(ModelEvent, type="model.message_stopped"):
    """The message is whole."""

    stop_reason: str
    input_tokens: int
    output_tokens: int


def model_message_started(run_id: str, *, message_id: str, model: str) -> ModelMessageStarted:
    """Return the event that the model begins to answer.

    message_id: unique in the run. model: which one answers.
    """
    return ModelMessageStarted(run_id=run_id, message_id=message_id, model=model)


def model_content_block_started(
    run_id: str, *, message_id: str, index: int, kind: BlockKind = "text"
) -> ModelContentBlockStarted:
    """Return the event that a block begins.

    index: of the block in its message, from 0. kind: "text", "thinking" or "tool_use".
    Errors: InvalidEvent for another index or kind.
    """
    if kind not in ("text", "thinking", "tool_use"):
        raise InvalidEvent(f"kind is 'text', 'thinking' or 'tool_use', not {kind!r}")
    return ModelContentBlockStarted(
        run_id=run_id, message_id=message_id, index=_index(index), kind=kind
    )


def model_content_block_delta(
    run_id: str, *, message_id: str, index: int, text: str
) -> ModelContentBlockDelta:
    """Return the event that a piece of a block is here.

    index: of the block in its message, from 0. text: to be put behind the pieces before; of a
    "tool_use" block, a piece of the JSON of the arguments.
    Errors: InvalidEvent for another index.
    """
    return ModelContentBlockDelta(
        run_id=run_id, message_id=message_id, index=_index(index), text=text
    )


def model_content_block_stopped(
    run_id: str, *, message_id: str, index: int
) -> ModelContentBlockStopped:
    """Return the event that a block is whole. index: of the block, from 0. Errors: InvalidEvent."""
    return ModelContentBlockStopped(run_id=run_id, message_id=message_id, index=_index(index))


def model_message_stopped(
    run_id: str,
    *,
    message_id: str,
    stop_reason: str = "end_turn",
    input_tokens: int = 0,
    output_tokens: int = 0,
) -> ModelMessageStopped:
    """Return the event that a message is whole.

    stop_reason: why it ends, as the model says it. input_tokens, output_tokens: what it took.
    """
    return ModelMessageStopped(
        run_id=run_id,
        message_id=message_id,
        stop_reason=stop_reason,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )


# --- questions


class BeforeToolCall(HookEvent, type="hook.before_tool_call"):
    """May this tool be called, and with these arguments?"""

    call_id: str
    tool: str
    arguments: str


class BeforeModelCall(HookEvent, type="hook.before_model_call"):
    """May the model be asked this?"""

    model: str
    prompt: str


def hook_before_tool_call(
    run_id: str, *, call_id: str, tool: str, arguments: Mapping[str, Any] | str
) -> BeforeToolCall:
    """Return the question whether a tool may be called; as `agent_tool_called`."""
    return BeforeToolCall(
        run_id=run_id, call_id=call_id, tool=tool, arguments=_json_text(arguments, tool)
    )


def hook_before_model_call(run_id: str, *, model: str, prompt: str) -> BeforeModelCall:
    """Return the question whether the model may be asked. model: which one. prompt: what."""
    return BeforeModelCall(run_id=run_id, model=model, prompt=prompt)


def _index(index: int) -> int:
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise InvalidEvent(f"index counts the blocks of a message from 0: it cannot be {index!r}")
    return index


def _json_text(arguments: Mapping[str, Any] | str, tool: str) -> str:
    """Return a JSON object as text; keys in order, so that equal arguments are equal events."""
    try:
        value = msgspec.json.decode(arguments) if isinstance(arguments, str) else dict(arguments)
        text = msgspec.json.encode(value, order="deterministic").decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEvent(f"the arguments of {tool} are not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidEvent(f"the arguments of {tool} are a JSON object, not {arguments!r:.80}")
    return text
