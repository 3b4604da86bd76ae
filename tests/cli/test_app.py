"""The command line as a whole: help, mistakes, exit codes, what is never shown."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from bus.cli.app import COMMANDS
from tests.cli.conftest import ROOT, CommandLine, ended
from tests.cli.shop import OrderPaid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bus import Bus
    from tests.cli.zygote import Zygote
    from tests.conftest import PrivateServer

    Command = Callable[..., subprocess.CompletedProcess[str]]

USUAL_S = 0.07  # what `import asyncio` takes in a new process
CANARY = "s3cret-passw0rd"
VERBS = {
    "topics": ("ls", "info", "set", "trim"),
    "groups": ("ls", "info", "lag", "create", "rm", "seek", "pause", "resume"),
    "consumers": ("ls", "rm"),
    "pending": ("ls", "show", "retry", "dead-letter"),
    "dead": ("ls", "show", "redrive", "purge", "export"),
    "schema": ("ls", "export", "check"),
    "check": ("lag", "pending", "dead", "workers"),
}
EVERY = [(name,) for name, *_ in COMMANDS if name not in VERBS]
EVERY += [(noun, verb) for noun, verbs in VERBS.items() for verb in verbs]


def bus(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bus", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_help_names_every_command_and_comes_at_once() -> None:
    """The quickest of a few, and under 0.4 s where the machine has its usual speed.

    What is measured is the program, not what else the machine does: on one that needs longer for
    nothing but `import asyncio`, it may take longer, too.
    """
    helped_s, imported_s = [], []
    for _ in range(5):
        began = time.perf_counter()
        ran = bus("--help")
        helped_s.append(time.perf_counter() - began)
        assert ran.returncode == 0
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import asyncio"], check=True)
        imported_s.append(time.perf_counter() - began)
    assert all(name in ran.stdout for name, *_ in COMMANDS)
    assert min(helped_s) < 0.4 * max(1.0, min(imported_s) / USUAL_S)


def test_neither_redis_nor_the_event_loop_is_imported_for_help() -> None:
    looks = "import sys; from bus.__main__ import main; sys.argv = ['bus', '--help']\n"
    looks += "try: main()\nexcept SystemExit: pass\n"
    looks += "print([m for m in ('redis', 'hiredis', 'uvloop', 'bus.bus') if m in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", looks], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_every_command_says_what_it_does(command: Command, words: tuple[str, ...]) -> None:
    ran = command(*words, "--help")
    assert ran.returncode == 0
    assert f"Usage: bus {' '.join(words)}" in ran.stdout
    assert len(ran.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tial", "order"], 'Did you mean "tail"?'),
        (["groups", "lga"], 'Did you mean "lag"?'),
        (["history", "order", "--sicne", "@-1h"], "Did you mean --since?"),
        (["history"], "requires an argument"),
        (["history", "order", "--limit", "ten"], "Invalid value"),
        (["history", "order", "--since", "yesterday"], "'yesterday' is no position"),
        (["history", "order", "--where", "cents >"], "is no expression"),
        (["history", "order", "--where", "cents = 5"], "== compares"),
        (["dead", "ls", "receipts", "--where", ""], "is no expression"),
        (["dead", "purge", "receipts", "--where", "cents = 5"], "== compares"),
        (["dead", "ls", "receipts", "--limit", "-1"], "--limit"),
        (["pending", "ls", "receipts", "--limit", "-1"], "--limit"),
        (["history", "order", "--limit", "0"], "--limit"),
        (["tail", "order", "--limit", "-5"], "--limit"),
        (["groups", "pause", "receipts", "--until", "end"], "--until is a length of time"),
        (["groups", "pause", "receipts", "--until", "9" * 400 + "d"], "--until is"),
        (["groups", "lag", "--watch", "9" * 400], "--watch is a length of time"),
        (["topics", "set", "order", "--retention", "9" * 30], "--retention is a length of time"),
        (["publish", "order.piad", "{}", "--app", "shop"], "did you mean order.paid?"),
        (["publish", "ordre.paid", "{}"], "--new-topic"),
        (["history", "order", "--where", "open('f')"], "is no expression"),
        (["history", "order", "--type", "order..paid"], "is not valid"),
        (["tail", "order", "--until-idle", "soon"], "is a length of time"),
        (["publish", "paid", "{}"], "is not a dotted name"),
        (["publish", "order.paid", "{}", "--count", "0"], "--count"),
        (["groups", "seek", "receipts"], "either --to, or --recount"),
        (["groups", "lag", "--watch", "0"], "--watch"),
        (["pending", "retry", "receipts"], "which ones?"),
        (["dead", "redrive", "receipts"], "which ones?"),
        (["dead", "purge", "receipts"], "which ones?"),
        (["dead", "redrive", "receipts", "--all", "--set", "cents"], "--set is FIELD=VALUE"),
        (["topics", "set", "order"], "what is to change?"),
        (["topics", "trim", "order"], "say what goes"),
        (["schema", "ls"], "--app"),
        (["history", "order", "--app", "nowhere"], "cannot import 'nowhere'"),
        (["worker", "nowhere"], "cannot import 'nowhere'"),
        (["tail", "order", "--url", "localhost:6379"], "has no scheme"),
    ],
    ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else None,
)
def test_a_mistake_is_named_and_exits_with_2(
    command: Command, words: list[str], said: str, valkey_url: str
) -> None:
    url = [] if "--url" in words else {"BUS_URL": valkey_url}
    ran = command(*words, PYTHONPATH=str(ROOT / "tests" / "cli"), **dict(url))
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ran.stdout + ran.stderr).split())
    assert said in text
    assert ran.returncode == 2
    assert "Traceback" not in text


async def test_unknown_topics_and_groups_say_what_there_is(cli: CommandLine, bus: Bus) -> None:
    await bus.admin.create_group("receipts", "order")
    ran = await cli("history", "oder")
    assert (ran.code, "did you mean order?" in ran.err) == (2, True)
    ran = await cli("groups", "ls", "reciepts")
    assert (ran.code, "did you mean receipts?" in ran.err) == (2, True)
    for words in (["groups", "pause"], ["pending", "ls"], ["dead", "ls"], ["groups", "info"]):
        ran = await cli(*words, "reciepts")
        assert (ran.code, "did you mean receipts?" in ran.err) == (2, True), words


@pytest.mark.parametrize("words", ["topics ls", "tail order", "worker tests.cli.shop"])
def test_a_server_that_is_away_exits_with_69(command: Command, words: str) -> None:
    ran = command(*words.split(), BUS_URL="redis://127.0.0.1:1/0")
    assert ran.returncode == 69
    assert "nobody answers at redis://127.0.0.1:1/0" in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_what_is_interrupted_exits_with_130(
    cli: CommandLine, bus: Bus, number: signal.Signals
) -> None:
    process = await cli.start("tail", "order", "--since", "start", "--json")
    await bus.redis.xadd("bus:{order:0}", {"id": "1", "type": "order.paid", "data": "{}"})
    assert process.stdout is not None
    async with asyncio.timeout(20):
        assert b"order.paid" in await process.stdout.readline()
    process.send_signal(number)
    assert (await ended(process)).code == 130


async def test_a_reader_that_goes_away_is_no_error(cli: CommandLine, bus: Bus) -> None:
    for _ in range(30):
        data = '{"x":"' + "x" * 5_000 + '"}'
        await bus.redis.xadd("bus:{order:0}", {"id": "1", "type": "order.paid", "data": data})
    script = (
        f"'{sys.executable}' -m bus history order --json | head -n 1 | wc -l;"
        " echo ${PIPESTATUS[0]}"
    )
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        script,
        cwd=cli.folder,
        env=cli.environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (out.split(), err) == ([b"1", b"0"], b"")


def test_the_url_is_that_of_the_option_then_of_the_environment(
    command: Command, valkey_url: str
) -> None:
    away = "redis://127.0.0.1:1/0"
    assert command("topics", "ls", "--url", valkey_url, BUS_URL=away).returncode == 0
    assert command("topics", "ls", BUS_URL=valkey_url, REDIS_URL=away).returncode == 0
    environment = {k: v for k, v in os.environ.items() if k != "BUS_URL"}
    ran = subprocess.run(
        [sys.executable, "-m", "bus", "topics", "ls"],
        env=environment | {"REDIS_URL": valkey_url},
        cwd=ROOT,
        check=False,
    )
    assert ran.returncode == 0


def test_the_password_is_never_shown(command: Command, private_server: PrivateServer) -> None:
    server = private_server(extra_args=("--requirepass", "another"))
    wrong = server.url.replace("redis://", f"redis://:{CANARY}@")
    for words in (["topics", "ls"], ["doctor"], ["worker", "tests.cli.shop"], ["tail", "--help"]):
        for where in ([], ["--url", wrong]):
            ran = command(*words, *where, BUS_URL=wrong)
            assert CANARY not in ran.stdout + ran.stderr
            code = {"--help": 0, "doctor": 69}.get(words[-1], 1)
            assert ran.returncode == code, (words, ran)
    ran = command("topics", "ls", "--url", f"redis://:{CANARY}@127.0.0.1:1/0")
    assert CANARY not in ran.stdout + ran.stderr
    ran = command("topics", "ls", "--url", f"redis//:{CANARY}@127.0.0.1:1/0")
    assert CANARY not in ran.stdout + ran.stderr


def test_without_the_extra_it_says_what_to_install() -> None:
    hides = "import sys; sys.modules['rich'] = sys.modules['simpleeval'] = None\n"
    hides += "from bus.__main__ import main; sys.exit(main())"
    ran = subprocess.run(
        [sys.executable, "-c", hides], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 69
    assert "rich, simpleeval" in ran.stderr
    assert "pip install 'bus-streams[cli]'" in ran.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_get_what_completes_commands(command: Command, shell: str) -> None:
    ran = command("completion", shell)
    assert ran.returncode == 0
    assert all(name in ran.stdout for name, *_ in COMMANDS)
    assert "dead-letter" in ran.stdout
    if shell == "bash":
        checked = subprocess.run(["bash", "-n"], input=ran.stdout, text=True, check=False)
        assert checked.returncode == 0


def test_bash_completes_a_verb() -> None:
    script = "source <(python -m bus completion bash); COMP_WORDS=(bus groups pau); COMP_CWORD=2;"
    script += " $(complete -p bus | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}"
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"  # noqa: PTH120
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.split() == ["pause"], ran.stderr


async def test_what_the_server_refuses_exits_with_1(cli: CommandLine, bus: Bus) -> None:
    await bus.redis.set("bus:{order:0}", "no stream")
    ran = await cli("history", "order")
    assert (ran.code, "bus:{order:0} holds another Redis type" in ran.err) == (1, True)


def test_what_makes_a_shell_complete_is_json_too(command: Command) -> None:
    ran = command("completion", "bash", "--json")
    said = json.loads(ran.stdout)
    assert (said["shell"], "complete" in said["script"]) == ("bash", True)


def test_a_password_is_in_no_error(command: Command) -> None:
    for words in (
        ("topics", "ls", f"redis://:{CANARY}@127.0.0.1:1/0"),
        ("topics", "ls", "--limit", f"redis://:{CANARY}@127.0.0.1:1/0"),
        ("history", "order", "--limit", f"redis://u:{CANARY}@127.0.0.1:1/0"),
    ):
        ran = command(*words)
        assert ran.returncode == 2
        assert CANARY not in ran.stdout + ran.stderr


async def test_what_all_commands_take_may_stand_first(cli: CommandLine, bus: Bus) -> None:
    address = cli.environment["BUS_URL"]
    ran = await cli("--url", address, "--json", "topics", "ls", BUS_URL="redis://127.0.0.1:1/0")
    assert (ran.code, ran.lines[0]["name"]) == (0, "order")
    ran = await cli(f"--url={address}", "topics", "ls", BUS_URL="redis://127.0.0.1:1/0")
    assert ran.code == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ('publish order.paid \'{"order_id":"o"}\' --json --count 5000', 1),
        ("history order", 0),
        ("groups pause nobody", 2),
    ],
)
def test_who_stops_reading_what_changes_something_is_no_success(
    valkey_url: str, shop: Path, zygote: Zygote, words: str, code: int
) -> None:
    cli = CommandLine(shop, valkey_url, zygote)
    setup = 'publish order.paid \'{"order_id":"o"}\' --new-topic --count 3'
    line = f"'{sys.executable}' -m bus {{}}"
    ran = subprocess.run(
        [
            "/bin/bash",
            "-c",
            f"{line.format(setup)} && {line.format(words)} | true; exit ${{PIPESTATUS[0]}}",
        ],
        cwd=cli.folder,
        env=cli.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == code, ran
    assert ("nobody reads what is written" in ran.stderr) is (code == 1)
    assert "Traceback" not in ran.stderr


async def test_who_may_only_read_may_look(cli: CommandLine, bus: Bus) -> None:
    await bus.admin.create_group("receipts", "order")
    await bus.publish(OrderPaid(order_id="o", cents=1))
    await bus.redis.execute_command(
        "ACL", "SETUSER", "reader", "on", ">p", "~*", "&*", "+@read", "+@connection", "+time"
    )
    try:
        url = cli.environment["BUS_URL"].replace("redis://", "redis://reader:p@")
        for words in (
            ("topics", "ls"),
            ("topics", "info", "order"),
            ("groups", "ls"),
            ("groups", "lag"),
            ("consumers", "ls"),
            ("pending", "ls", "receipts"),
            ("dead", "ls", "receipts"),
            ("history", "order"),
        ):
            ran = await cli(*words, BUS_URL=url)
            assert ran.code == 0, (words, ran)
        ran = await cli("groups", "pause", "receipts", BUS_URL=url)
        assert (ran.code, "reader:***@" in ran.err, "may not run" in ran.err) == (1, True, True)
    finally:
        await bus.redis.execute_command("ACL", "DELUSER", "reader")


async def test_names_that_are_no_text_are_shown_and_said_in_one_way(
    cli: CommandLine, bus: Bus
) -> None:
    await bus.redis.xgroup_create("bus:{order:0}", b"g\xff", "0", mkstream=True)
    await bus.publish_many([OrderPaid(order_id=f"o-{n}", cents=1) for n in range(9)])
    await bus.redis.xreadgroup(b"g\xff", b"c\xfe", {"bus:{order:0}": ">"}, count=1)
    (row,) = await cli.json("groups", "ls", r"g\xff")
    assert row["group"] == r"g\xff"
    (entry,) = await cli.json("pending", "ls", r"g\xff")
    assert (entry["group"], entry["consumer"]) == (r"g\xff", r"c\xfe")
    (shown,) = await cli.json("pending", "show", r"g\xff", entry["id"])
    assert shown["group"] == r"g\xff"
    ran = await cli("pending", "dead-letter", r"g\xff", "--all", "--why", "x", "--yes")
    assert (ran.code, "is not valid" in ran.err) == (2, True)
    ran = await cli("consumers", "rm", r"c\xfe", "--group", r"g\xff", "--yes")
    assert (ran.code, r"c\xfe" in ran.err) == (1, True), "it was heard of just now"
    await bus.redis.xgroup_delconsumer("bus:{order:0}", b"g\xff", b"c\xfe")
    for words in (("seek", r"g\xff", "--to", "end"), ("rm", r"g\xff")):
        ran = await cli("groups", *words, "--yes", "--json")
        assert (ran.code, ran.lines[0]["group"]) == (0, r"g\xff"), (words, ran)
