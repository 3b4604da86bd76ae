"""What the function of a handler takes, by its signature: (event), (event, delivery), or a list.

Mistakes are told where the handler is declared, and not by its first event.
"""

import inspect
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from bus.delivery import Delivery
from bus.errors import DeclarationError
from bus.event import Event


def checked_signature(
    call: Callable[..., Any], asked: list[type[Event]], group: str, *, batch: bool
) -> bool:
    """Return whether `call` takes (event, delivery); refuse what the bus could not call.

    asked: the event classes that the handler of `group` asks for. Errors: DeclarationError.
    """
    if batch:
        _check_takes_list(call, group)
        _check_list_annotation(call, asked, group)
        return False
    _check_annotation(call, asked, group)
    return takes_two(call, f"handler {group}", "delivery")


def _check_annotation(call: Callable[..., Any], asked: list[type[Event]], group: str) -> None:
    """Refuse a handler whose first parameter is annotated as none of the events it asks for."""
    name, hint = _first_annotation(call)
    accepted = _members(hint)
    if any((typing.get_origin(a) or a) is Delivery for a in accepted):
        raise DeclarationError(f"handler {group}: the event comes first, then the delivery")
    if any(_is_delivery(item) for a in accepted for item in typing.get_args(a)):
        raise DeclarationError(
            f"handler {group}: only a batch handler takes a list of deliveries: declare it with"
            " batch=, the most per call"
        )
    if not _fits(accepted, asked):
        raise _of_another_event(asked, name, hint, group)


def _check_list_annotation(call: Callable[..., Any], asked: list[type[Event]], group: str) -> None:
    """Refuse a batch handler whose parameter is annotated as anything but a list of deliveries."""
    name, hint = _first_annotation(call)
    if hint is Any:
        return
    right = f"list[Delivery[{' | '.join(e.__name__ for e in asked) or 'Event'}]]"
    takes = typing.get_origin(hint) or hint
    items = [item for arg in typing.get_args(hint) for item in _members(arg)]
    is_list = isinstance(takes, type) and issubclass(list, takes)
    if not is_list or not all(item is Any or _is_delivery(item) for item in items):
        raise DeclarationError(
            f"handler {group}: a batch handler takes a list of deliveries: annotate `{name}` as"
            f" {right}, not as {_shown(hint)}"
        )
    events = [e for item in items for arg in typing.get_args(item) for e in _members(arg)]
    if events and not _fits(events, asked):
        raise _of_another_event(asked, name, hint, group)


def _first_annotation(call: Callable[..., Any]) -> tuple[str, Any]:
    """Return name and type of the first parameter; Any if it says nothing, or nothing we know."""
    try:
        hints = typing.get_type_hints(call)
        first = next(iter(inspect.signature(call).parameters.values()))
    except Exception:  # annotations that cannot be resolved here are the type checker's business
        return "", Any
    return first.name, hints.get(first.name, Any)


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _is_delivery(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) is Delivery


def _fits(accepted: Sequence[Any], asked: list[type[Event]]) -> bool:
    """Return whether an annotation takes one of the events asked for, as far as we can tell."""
    classes = [a for a in accepted if isinstance(a, type)]
    if Any in accepted or len(classes) != len(accepted) or not asked:
        return True
    return any(issubclass(event, c) for event in asked for c in classes)


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _of_another_event(
    asked: list[type[Event]], name: str, hint: Any, group: str
) -> DeclarationError:
    return DeclarationError(
        f"handler {group}: asks for {', '.join(e.__name__ for e in asked)} and its parameter"
        f" `{name}` is annotated as {_shown(hint)}"
    )


def _check_takes_list(call: Callable[..., Any], group: str) -> None:
    parameters = inspect.signature(call).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unfilled = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    several = len(positional) != 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if several or unfilled:
        raise DeclarationError(
            f"handler {group}: a batch handler takes one list, (deliveries), each with its event"
            f" in `.event`, not {inspect.signature(call)}"
        )


def takes_two(call: Callable[..., Any], who: str, second: str) -> bool:
    """Return whether `call` can take (event, second), and not the event alone.

    who: takes it, for the error. Errors: DeclarationError if it takes neither.
    """
    _, most = _positional(call, who, second)
    return most > 1


def needs_two(call: Callable[..., Any], who: str, second: str) -> bool:
    """Return whether `call` must be given (event, second): `lambda event, name=name: ...` is not.

    who: takes it, for the error. Errors: DeclarationError if it takes neither.
    """
    required, _ = _positional(call, who, second)
    return required > 1


def _positional(call: Callable[..., Any], who: str, second: str) -> tuple[int, float]:
    """Return how many values `call` must and can be given by position."""
    parameters = inspect.signature(call).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return len(required), math.inf
    unfilled = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if not positional or len(required) > 2 or unfilled:  # noqa: PLR2004 - the event and that
        raise DeclarationError(
            f"{who}: takes (event) or (event, {second}), not {inspect.signature(call)}"
        )
    return len(required), len(positional)
