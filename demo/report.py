"""The table at the end."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from demo.ingest import CALLS_AT_A_TIME, INGEST, MESSAGES_PER_S, PACED, UPDATES_PER_S
from demo.outcome import Outcome
from demo.workload import VISIBILITY_S
from handlers.indexing import Hit


def table(outcome: Outcome) -> str:
    """Return the report as text."""
    parts = (
        *(_published(outcome), _groups(outcome), _failures(outcome), _state(outcome)),
        *(_speed(outcome), _searches(outcome.searches)),
    )
    return "\n\n".join("\n".join(part) for part in parts)


def _published(outcome: Outcome) -> Iterator[str]:
    book = outcome.book
    by_handlers = Counter(e.type for e in outcome.entries if e.by_handler)
    yield "published"
    yield f"  through the services         {len(book.entries):>8,}   each with a receipt"
    yield f"  by handlers                  {by_handlers.total():>8,}   each once:"
    for type_, number in by_handlers.most_common():
        yield f"    {type_ or '':<27}{number:>8,}"
    yield f"  undecodable, written by hand {len(book.raw):>8,}"


def _groups(outcome: Outcome) -> Iterator[str]:
    yield "group        wanted    handled    retried    run again    dead letters    lost"
    for r in outcome.groups:
        handled = len(set(r.wanted.values()) & r.handled_at_ms.keys())
        again = sum(r.finished.values()) - len(r.finished)
        yield (
            f"{r.group:<9}{r.events:>10,}{handled:>11,}{r.retried:>11,}{again:>13,}"
            f"{len(r.dead):>16,}{len(r.lost):>8,}"
        )
    lost = sum(len(r.lost) for r in outcome.groups)
    yield f"lost: {lost}"
    for r in outcome.groups:
        for stream, entry_id in r.lost[:5]:
            yield f"  {r.group} never saw the end of entry {entry_id} of {stream}"


def _failures(outcome: Outcome) -> Iterator[str]:
    takeover = outcome.takeover
    cut_off = sum(r.cut_off for r in outcome.groups)
    yield "failures"
    yield (
        f"  worker {takeover.pid} killed (SIGKILL) with {len(takeover.held)} entries in hand,"
        f" {cut_off} of them running,"
    )
    yield f"    {takeover.messages} of them messages to be charged"
    yield (
        f"  reclaimed after the kill: {takeover.reclaimed}, the last one {takeover.taken_s:.1f} s"
        f" after it; all were finished after {takeover.finished_s:.1f} s"
    )
    yield f"    (an entry of a dead worker lies still for {VISIBILITY_S:.0f} s before it is taken)"
    for record in outcome.groups:
        if record.dead:
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(record.reasons.items()))
            yield f"  dead letters of {record.group}: {reasons}"
    attempts = outcome.groups[0].failed.get(outcome.late_event_id, 0) + 1
    yield f"  the document whose text came late was indexed at attempt {attempts}"


def _state(outcome: Outcome) -> Iterator[str]:
    accounts, removal, views = outcome.accounts, outcome.removal, outcome.views
    crossed = sorted(user for user, left in accounts.balances.items() if left < 0)
    yield "state, changed by handlers once per event although a worker was killed"
    yield (
        f"  quotas: {accounts.messages:,} messages used {accounts.used.total():,} tokens of"
        f" {len(accounts.balances)} users; every balance is what was granted minus what was used"
        if accounts.balances == accounts.expected_balances
        else f"  quotas: balances are {accounts.balances}, not {accounts.expected_balances}"
    )
    yield f"    quota.exceeded was told {accounts.told.total()} times, of {', '.join(crossed)}"
    told = "once" if removal.times_told == {1} else f"{sorted(removal.times_told)} times"
    yield (
        f"  the deleted dataset: {removal.documents:,} documents, each told to be deleted {told};"
        f" {len(removal.left)} keys are left of it"
    )
    yield (
        f"  searches and lists: {views.hits:,} answered from the cache, {views.misses:,} computed;"
        f" {views.wrong} wrong when all was quiet"
    )


def _speed(outcome: Outcome) -> Iterator[str]:
    yield "speed (all processes and the server share this machine; recording is included)"
    ingest = [e for e in outcome.book.entries if e.phase == INGEST]
    first_ms = min(e.called_at_ms for e in ingest)
    published_s = (max(e.called_at_ms for e in ingest) - first_ms) / 1000
    yield f"  published {_rate(len(ingest), published_s)}, {CALLS_AT_A_TIME} calls at a time"
    undisturbed = list(_latencies(outcome, INGEST))
    last_ms = max((ended_ms for _, ended_ms, _ in undisturbed), default=first_ms)
    ended = sum(at <= last_ms for r in outcome.groups for at in r.handled_at_ms.values())
    yield f"  handled   {_rate(ended, (last_ms - first_ms) / 1000)}, all groups together, from the"
    yield "            first call to the last undisturbed event, one worker killed meanwhile"
    yield "  latency from the call of the service to the end of the handler:"
    groups = [r.group for r in outcome.groups]
    for phase, meaning in (
        (INGEST, "ingest at full speed: mostly the wait behind the backlog"),
        (PACED, f"paced, {MESSAGES_PER_S} messages/s and {UPDATES_PER_S} updates/s, nothing else"),
    ):
        yield f"    {meaning}"
        for group in groups:
            took_ms = [took for took, _, of in _latencies(outcome, phase) if of == group]
            if took_ms:
                yield (
                    f"      {group:<8} p50 {percentile(took_ms, 50):>9,.1f} ms"
                    f"   p99 {percentile(took_ms, 99):>9,.1f} ms   of {len(took_ms):,} events"
                )
    yield "    without events that were retried or lay with the killed worker"


def _latencies(outcome: Outcome, phase: str) -> Iterator[tuple[float, float, str]]:
    """Yield took_ms, ended_at_ms and group for every undisturbed event of a phase."""
    held = set(outcome.takeover.held)
    for record in outcome.groups:
        for event in outcome.book.entries:
            ended_ms = record.handled_at_ms.get(event.event_id)
            if (
                event.phase == phase
                and ended_ms is not None
                and record.started.get(event.event_id) == 1
                and (record.group, event.place) not in held
            ):
                yield ended_ms - event.called_at_ms, ended_ms, record.group


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that is not below `percent` % of all values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _rate(count: int, seconds: float) -> str:
    if seconds <= 0:
        return f"{count:,} events"
    return f"{count / seconds:>8,.0f} events/s ({count:,} in {seconds:.1f} s)"


def _searches(searches: Sequence[tuple[str, list[Hit]]]) -> Iterator[str]:
    yield "searches"
    for words, hits in searches:
        yield f"  {words!r}"
        for hit in hits:
            yield f"    {hit.score:7.2f}  {hit.title}"
        if not hits:
            yield "    nothing found"
