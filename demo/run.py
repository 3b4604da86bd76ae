"""The order of events of the main job, from the server's start to the exit code.

1. start the server and two workers; 2. ingest every file, with poison among it; 3. when half of
the documents are indexed, send messages and kill one worker while it charges them, start another;
4. wait until nothing is left to do; 5. publish and search at a steady pace, for latencies that mean
something; 6. delete a dataset and wait until what was in it has gone; 7. stop the workers, read the
record, print the table, search; 8. exit 0 only if nothing is lost and every count agrees.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

from redis.exceptions import RedisError

from bus import Bus, BusError
from bus.embedded import EmbeddedServer, EmbeddedServerError
from bus.streams import keys
from demo import poison, workload
from demo.crew import Crew, WorkerGone
from demo.ingest import Files, Ingest, SourceFile, find_files, kept
from demo.ledger import Book
from demo.outcome import Outcome, checks, read_outcome
from demo.progress import Progress
from demo.report import table
from demo.takeover import Takeover, half_way, kill_one
from demo.views import Views, look_at_views
from demo.watch import backlog, take_snapshot, until
from handlers.indexing import count_words

WORKERS = 2
LOOK_S = 0.2
STALLED_S = 30.0  # six times as long as a dead worker's entries lie still
SUBJECT_CHARS = 5  # shorter words say little about a file
SEARCHES = ("event loop", "regular expression pattern", "socket timeout")

DONE, FAILED, USAGE, UNREACHABLE = 0, 1, 2, 69
BY_SIGNAL = 128


class Stalled(Exception):
    """Nothing has happened for a long time, and there is something left to do."""


class NotEmpty(Exception):
    """The database holds data, which the demo must not mix with its own."""


def main(folder: str | None = None, url: str | None = None) -> int:
    """Run the demo on a folder and return the exit code.

    folder: its text files are ingested; None takes the Python standard library's sources.
    url: a server with an empty database; None starts the embedded one for the time of the demo.
    Returns 0: nothing lost, every count agrees. 1: something is off, and is printed. 2: bad
    arguments. 69: the server is not reachable. 128 + n: ended by signal n.
    """
    try:
        files = find_files(folder)
    except (OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return USAGE
    return asyncio.run(_until_signal(files, url))


async def _until_signal(files: Files, url: str | None) -> int:
    """Run the demo; a signal ends it in good order, a second one at once."""
    demo = Demo(files)
    job = asyncio.ensure_future(demo.run(url))
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        job.cancel()
        if len(received) > 1:
            demo.kill_workers()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    try:
        return await job
    except asyncio.CancelledError:
        if not received:
            raise
        print("\ndemo: stopped", file=sys.stderr)
        return BY_SIGNAL + received[0]
    except NotEmpty as error:
        print(f"demo: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # as `head` does when it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BY_SIGNAL + signal.SIGPIPE
    except (BusError, RedisError) as error:
        print(f"demo: {type(error).__name__}: {error}", file=sys.stderr)
        return UNREACHABLE
    except EmbeddedServerError as error:
        print(f"demo: {error}", file=sys.stderr)
        return FAILED


class Demo:
    """One run of the demo."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.progress = Progress()
        self.book = Book()
        self.views = Views()
        self._crew: Crew | None = None

    def kill_workers(self) -> None:
        """Kill the workers without waiting for them."""
        if self._crew is not None:
            self._crew.kill_all()

    async def run(self, url: str | None) -> int:
        """Run it and return the exit code."""
        files = self.files.files
        self.progress.say(f"{len(files):,} files: {self.files.rule}")
        with _server(url) as server_url:
            async with (
                Bus.connect(server_url, topics=[workload.documents]) as bus,
                Crew(server_url) as self._crew,
            ):
                await _refuse_data(bus.redis)
                try:
                    takeover = await self._watched(bus, self._crew)
                except (Stalled, WorkerGone) as error:
                    self.progress.say(f"FAILED: {error}\n{self._crew.last_words()}")
                    return FAILED
                finally:
                    self.progress.clear()
                await self._crew.stop()
                outcome = await read_outcome(
                    bus.redis,
                    *(files, self.book, takeover, self.views),
                    *(self._crew, self._searches()),
                )
        return self._verdict(outcome)

    async def _watched(self, bus: Bus, crew: Crew) -> Takeover:
        """Run the phases until they end, or until the watch says that it makes no sense."""
        job = asyncio.ensure_future(self._phases(bus, crew))
        watch = asyncio.ensure_future(self._watch(bus.redis, crew))
        try:
            await asyncio.wait({job, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()  # raises
            return await job
        except ExceptionGroup as group:
            raise _first(group) from group
        finally:
            job.cancel()
            watch.cancel()
            await asyncio.gather(job, watch, return_exceptions=True)

    async def _phases(self, bus: Bus, crew: Crew) -> Takeover:
        ingest = Ingest(bus, self.book)
        files = self.files.files
        for _ in range(WORKERS):
            await crew.hire()
        await until(crew.all_ready)
        self.progress.say(f"{WORKERS} workers are ready; every file becomes a document")
        await ingest.set_up()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ingest.everything(files))
            tasks.create_task(poison.inject(bus.redis, ingest))
            takeover = tasks.create_task(self._kill_among_messages(bus, crew, ingest))
        await until(partial(_quiet, bus.redis))
        self.progress.say("nothing is left to do; publishing and searching at a steady pace")
        await ingest.paced(files, self._searches())
        await until(partial(_quiet, bus.redis))
        self.views = await look_at_views(ingest, self._searches())
        self.progress.say("deleting a dataset; what is in it goes with it")
        await ingest.remove_archive()
        await until(partial(_quiet, bus.redis))
        self.progress.say("stopping the workers")
        return takeover.result()

    async def _kill_among_messages(self, bus: Bus, crew: Crew, ingest: Ingest) -> Takeover:
        await half_way(bus.redis, len(self.files.files) // 2)
        killed = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ingest.many_messages(killed))
            return await kill_one(bus.redis, crew, self.progress.say, killed)

    async def _watch(self, redis: Any, crew: Crew) -> None:
        """Show the progress. Errors: WorkerGone, Stalled."""
        last: object = None
        changed_s = 0.0
        while True:
            crew.check()
            snapshot = await take_snapshot(redis)
            self.progress.show(self.book, snapshot)
            now = (snapshot, len(self.book.entries))
            if now != last:
                last, changed_s = now, self.progress.elapsed_s
            elif self.progress.elapsed_s - changed_s > STALLED_S:
                raise Stalled(f"nothing has happened for {STALLED_S:.0f} s: {snapshot}")
            await asyncio.sleep(LOOK_S)

    def _searches(self) -> Sequence[str]:
        """Return three searches: of known words, or of what the user's own files are about."""
        if self.files.own:
            return SEARCHES
        left = kept(self.files.files)
        third = max(1, len(left) // 3)
        spread = (*left[third // 2 :: third], *left)
        return list(islice(filter(None, map(_subject, spread)), 3))

    def _verdict(self, outcome: Outcome) -> int:
        print("\n" + table(outcome))
        off = [check for check in checks(outcome) if not check.agrees]
        for check in off:
            print(f"OFF: {check.what}: expected {check.expected}, found {check.found}")
        took = f"{self.progress.elapsed_s:.1f} s"
        if off:
            print(f"\n{len(off)} counts do not agree ({took})")
            return FAILED
        print(f"\nnothing is lost and every count agrees ({took})")
        return DONE


@contextmanager
def _server(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with EmbeddedServer() as server:
        yield server.url


async def _refuse_data(redis: Any) -> None:
    """Refuse a database in use. Errors: NotEmpty."""
    async for key in redis.scan_iter(count=1_000):
        if key.decode(errors="replace") not in (keys.TOPICS, keys.PROBE):
            raise NotEmpty(
                "the database is not empty. The demo publishes poison and serves every group of"
                " its topics: give it a database of its own, such as redis://localhost:6379/9"
            )


async def _quiet(redis: Any) -> bool:
    """Return whether no group has anything left to do."""
    return not await backlog(redis)


def _subject(file: SourceFile) -> str:
    """Return the two most frequent of the longer words of a file, "" when it has no words."""
    words = count_words(file.text().decode())
    longer = [word for word, _ in words.most_common() if len(word) >= SUBJECT_CHARS]
    return " ".join((longer or list(words))[:2])


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group that is none itself."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
