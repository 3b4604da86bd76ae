"""Files become documents, through the services as any program would use them."""

import asyncio
import hashlib
import sysconfig
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from bus import Bus, Receipt
from demo.ledger import Book
from demo.records import now_ms
from handlers.services import (
    MAX_TEXT_BYTES,
    MAX_TITLE_CHARS,
    AppService,
    DatasetService,
    DocumentService,
    MessageService,
    QuotaService,
)

APP_ID = "demo-app"
DATASET_ID = "demo-dataset"
ARCHIVE_ID = "demo-archive"  # the dataset that is deleted in the end
CALLS_AT_A_TIME = 32

UPDATE_EVERY = 25  # of the files, one in so many is changed after it was created...
DELETE_EVERY = 50  # ...and one in so many deleted, many before they are even indexed
ARCHIVE_EVERY = 8  # one in so many lies in the archive

# What each user may use up. Nobody has granted the first one anything.
SMALL, LARGE = 60, 1_000_000
GRANTS = {f"user-{n}": SMALL if n % 3 == 0 else LARGE for n in range(1, 10)}
USERS = ("user-0", *GRANTS)
FEWEST_MESSAGES = 300  # while a worker is killed; more, until it is

PACED_S = 1.5
MESSAGES_PER_S = 200
UPDATES_PER_S = 40

SEARCHES_PER_S = 40

SETUP, INGEST, MESSAGES, PACED, REMOVAL = "setup", "ingest", "messages", "paced", "removal"
CREATES = ("document.created", "dataset.document_added")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that is to become a document; its id is made of its path below the folder."""

    path: Path
    title: str

    @property
    def document_id(self) -> str:
        """The id of its document."""
        return "doc-" + hashlib.sha256(self.title.encode()).hexdigest()[:16]

    def text(self) -> bytes:
        """Return what is in the file."""
        return self.path.read_bytes()


@dataclass(frozen=True, slots=True)
class Files:
    """The files to ingest. `own`: they are the standard library's; `rule`: how they were chosen."""

    files: list[SourceFile]
    own: bool
    rule: str


def find_files(folder: str | None) -> Files:
    """Return the text files of a folder, or of the Python standard library without one.

    Text is what is UTF-8, without NUL characters, and not above 1 MB. Of the standard library it
    is the sources and texts, tests included and installed packages not: about 1,900 files.
    Errors: NotADirectoryError; ValueError when there is none.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder")
    if folder is None:
        names = _below(root, skip={"site-packages", "dist-packages", "__pycache__"})
        paths = [path for path in names if path.suffix in (".py", ".txt")]
        rule = "*.py and *.txt of the Python standard library, UTF-8, without installed packages"
    else:
        paths = list(_below(root, skip={"__pycache__", "node_modules"}))
        rule = "every UTF-8 file up to 1 MB; hidden ones, __pycache__ and node_modules left out"
    texts = [path for path in paths if _is_text(path)]
    if not texts:
        raise ValueError(f"there is no text file in {root}")
    files = [SourceFile(path, _title(path.relative_to(root))) for path in sorted(texts)]
    return Files(files, own=folder is None, rule=rule)


def _below(root: Path, skip: set[str]) -> Iterator[Path]:
    for path in root.iterdir():
        if path.name in skip or path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _below(path, skip)


def _is_text(path: Path) -> bool:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            return False
        content = path.read_bytes()
        content.decode()
    except (OSError, UnicodeDecodeError):
        return False
    return b"\0" not in content


def _title(path: Path) -> str:
    # A file name may hold bytes that are no text; an event may not.
    return str(path).encode(errors="replace").decode()[-MAX_TITLE_CHARS:]


class Ingest:
    """Publishes through the services and notes every receipt in the book."""

    def __init__(self, bus: Bus, book: Book) -> None:
        self.book = book
        self.apps = AppService(bus)
        self.datasets = DatasetService(bus)
        self.documents = DocumentService(bus)
        self.messages = MessageService(bus)
        self.quotas = QuotaService(bus)
        self._turns = asyncio.Semaphore(CALLS_AT_A_TIME)

    async def publish(
        self,
        phase: str,
        types: Sequence[str],
        method: Callable[..., Awaitable[Receipt | list[Receipt]]],
        *arguments: Any,
        **options: Any,
    ) -> None:
        """Call a method of a service and note the receipts of the `types` that it publishes.

        The time counts from here, the wait for a turn included.
        """
        called_at_ms = now_ms()
        async with self._turns:
            receipts = await method(*arguments, **options)
        self.book.note(
            phase, called_at_ms, types, receipts if isinstance(receipts, list) else [receipts]
        )

    async def set_up(self) -> None:
        """Create the app and its datasets, and grant the quotas."""
        await self.publish(SETUP, ["app.created"], self.apps.create, APP_ID, "Demo")
        create = self.datasets.create
        for dataset_id, name in ((DATASET_ID, "Files"), (ARCHIVE_ID, "Archive")):
            await self.publish(SETUP, ["dataset.created"], create, dataset_id, APP_ID, name)
        for user_id, tokens in GRANTS.items():
            await self.publish(SETUP, ["quota.granted"], self.quotas.grant, user_id, tokens)

    async def everything(self, files: Sequence[SourceFile]) -> None:
        """Create a document of each file; change and delete some."""
        into_archive = set(archived(files))
        create = partial(self._create, into_archive)
        await _at_a_time(CALLS_AT_A_TIME, create, files)
        await _at_a_time(CALLS_AT_A_TIME, self._update, updated(files))
        await _at_a_time(CALLS_AT_A_TIME, self._delete, deleted(files))

    async def many_messages(self, enough: asyncio.Event) -> None:
        """Send messages as fast as they are taken, until it is enough; a few hundred at least."""
        numbers = takewhile(lambda n: n < FEWEST_MESSAGES or not enough.is_set(), count())

        async def send() -> None:
            for number in numbers:
                await self._message(MESSAGES, f"message-{number}", number)

        async with asyncio.TaskGroup() as senders:
            for _ in range(CALLS_AT_A_TIME):
                senders.create_task(send())

    async def remove_archive(self) -> None:
        """Delete the archive; what is in it goes with it."""
        await self.publish(REMOVAL, ["dataset.deleted"], self.datasets.delete, ARCHIVE_ID)

    async def paced(self, files: Sequence[SourceFile], searches: Sequence[str]) -> None:
        """Publish and search at a steady rate, late answers or not, with nothing else to do."""
        left = kept(files)
        async with asyncio.TaskGroup() as calls:
            for number in range(int(PACED_S * MESSAGES_PER_S)):
                calls.create_task(self._paced_message(number))
            for number in range(int(PACED_S * UPDATES_PER_S)):
                calls.create_task(self._touch(number, left[number % len(left)]))
            for number in range(int(PACED_S * SEARCHES_PER_S)):
                calls.create_task(self._search(number, searches[number % len(searches)]))

    async def _create(self, into_archive: set[SourceFile], file: SourceFile) -> None:
        create, text = self.documents.create, file.text()
        dataset_id = ARCHIVE_ID if file in into_archive else DATASET_ID
        await self.publish(INGEST, CREATES, create, file.document_id, dataset_id, file.title, text)

    async def _update(self, file: SourceFile) -> None:
        update, text = self.documents.update, file.text() + b"\nsecond edition\n"
        await self.publish(INGEST, ["document.updated"], update, file.document_id, text=text)

    async def _delete(self, file: SourceFile) -> None:
        delete = self.documents.delete
        await self.publish(INGEST, ["document.deleted"], delete, file.document_id)

    async def _paced_message(self, number: int) -> None:
        await asyncio.sleep(number / MESSAGES_PER_S)
        await self._message(PACED, f"paced-{number}", number)

    async def _message(self, phase: str, message_id: str, number: int) -> None:
        text = "What is an event loop? " * (1 + number % 7)
        message = (message_id, USERS[number % len(USERS)], APP_ID, text)
        await self.publish(phase, ["message.created"], self.messages.create, *message)

    async def _search(self, number: int, words: str) -> None:
        await asyncio.sleep(number / SEARCHES_PER_S)
        # One of them changes all the time, so its views go; those of the other stay.
        await self.datasets.search((DATASET_ID, ARCHIVE_ID)[number % 2], words)

    async def _touch(self, number: int, file: SourceFile) -> None:
        await asyncio.sleep(number / UPDATES_PER_S)
        update = self.documents.update
        await self.publish(PACED, ["document.updated"], update, file.document_id, title=file.title)


def updated(files: Sequence[SourceFile]) -> Sequence[SourceFile]:
    """Return the files whose documents are changed after they were created."""
    return files[::UPDATE_EVERY]


def deleted(files: Sequence[SourceFile]) -> Sequence[SourceFile]:
    """Return the files whose documents their users delete."""
    return files[1::DELETE_EVERY]


def archived(files: Sequence[SourceFile]) -> Sequence[SourceFile]:
    """Return the files whose documents lie in the archive."""
    return files[2::ARCHIVE_EVERY]


def kept(files: Sequence[SourceFile]) -> list[SourceFile]:
    """Return the files whose documents are there in the end; at least the first."""
    gone = {*deleted(files), *archived(files)}
    return [file for file in files if file not in gone]


async def _at_a_time(
    takers: int, call: Callable[[SourceFile], Awaitable[None]], files: Iterable[SourceFile]
) -> None:
    rest = iter(files)

    async def take() -> None:
        for file in rest:
            await call(file)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(takers):
            tasks.create_task(take())
