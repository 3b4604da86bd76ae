"""What the documents show is run as written."""

import ast
import asyncio
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from bus import Bus, Topic
from bus.streams import topics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
IN_PROCESS = (ROOT / "docs/in-process.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"<!-- test: (\w+) -->\n *```\w*\n(.*?)\n *```", re.DOTALL)


def blocks(document: str) -> dict[str, str]:
    found = {}
    for name, body in _BLOCK.findall(document):
        lines = body.split("\n")
        indent = len(lines[0]) - len(lines[0].lstrip())
        found[name] = "\n".join(line[indent:] for line in lines) + "\n"
    return found


def run(script: Path, url: str) -> str:
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "BUS_URL": url, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_steps_print_a_receipt_and_the_replay_finds_it_again(
    valkey_url: str, tmp_path: Path
) -> None:
    code = blocks(README)
    hello, replay = tmp_path / "hello.py", tmp_path / "replay.py"
    hello.write_text(code["hello"], encoding="utf-8")
    replay.write_text(code["replay"], encoding="utf-8")

    assert run(hello, valkey_url) == "receipt for o-1: 12.50\n"
    assert "OrderPaid(order_id='o-1', cents=1250)" in run(replay, valkey_url)


def test_orders_are_followed_and_gone_on_with(valkey_url: str, tmp_path: Path) -> None:
    code = blocks(README)
    top, _, main = code["hello"].partition("async def main")
    drained = "await worker.drained(timeout_s=10)\n"
    assert drained in main
    publish = "await bus.publish(OrderPaid(order_id='o-2', cents=3_000))"
    calls = ["at = await follow(bus, {'bus:{order:0}': 'start'})", publish, "await follow(bus, at)"]
    main = main.replace(drained, f"{drained}            " + "\n            ".join(calls) + "\n")
    script = tmp_path / "follow.py"
    script.write_text(top + code["tail"] + "\n\nasync def main" + main, encoding="utf-8")
    lines = [line.partition(" OrderPaid")[2] for line in run(script, valkey_url).splitlines()]
    assert [line for line in lines if line] == [
        "(order_id='o-1', cents=1250)",
        "(order_id='o-2', cents=3000)",
    ]


def test_a_run_is_listened_to(valkey_url: str, tmp_path: Path) -> None:
    code = blocks(README)
    top, _, main = code["hello"].partition("@event_handler")
    main = "async def main" + main.partition("async def main")[2]
    start, _, rest = main.partition("        async with Worker")
    start += "        await asyncio.gather(listen(bus, 'run-42'), run(bus, 'run-42'))\n"
    script = tmp_path / "channel.py"
    imports = "from datetime import timedelta\n"
    end = "\n\nasyncio.run(main())\n"
    assert "asyncio.run(main())" in rest
    script.write_text(imports + top + code["channel"] + "\n\n" + start + end, encoding="utf-8")
    assert run(script, valkey_url).splitlines() == [
        "OrderPaid(order_id='run-42', cents=500)",
        "OrderPaid(order_id='run-42', cents=750)",
    ]


def test_receipts_are_replayed_into_their_group(valkey_url: str, tmp_path: Path) -> None:
    code = blocks(README)
    hello = code["hello"].replace("cents=1250", "cents=cents")
    hello = hello.replace(
        "        await bus.publish",
        "        for cents in (500, 2_000):\n            await bus.publish",
    )
    drained = "await worker.drained(timeout_s=10)\n"
    assert drained in hello
    hello = hello.replace(
        drained, f"{drained}            await receipts_again(bus)\n            {drained}"
    )
    top, _, main = hello.partition("async def main")
    again = code["again"].replace("receipts.checkpoint", str(tmp_path / "checkpoint"))
    again = again.replace("2026-11-20T09:00:00Z", "@-1h")
    script = tmp_path / "again.py"
    script.write_text(top + again + "\n\nasync def main" + main, encoding="utf-8")
    assert sorted(run(script, valkey_url).splitlines()) == [
        "1 of 2",
        "receipt for o-1: 20.00",
        "receipt for o-1: 20.00",
        "receipt for o-1: 5.00",
    ]


def test_a_dead_letter_is_mended_and_redriven(valkey_url: str, tmp_path: Path) -> None:
    code = blocks(README)
    hello = code["hello"].replace("    print(f", "    assert event.cents >= 0, event\n    print(f")
    hello = hello.replace('group="receipts"', 'group="receipts", max_attempts=1, breaker=None')
    hello = hello.replace("cents=1250", "cents=-1")
    drained = "await worker.drained(timeout_s=10)\n"
    assert drained in hello
    hello = hello.replace(drained, f"{drained}            await mend(bus)\n            {drained}")
    top, _, main = hello.partition("async def main")
    mend = code["dead"].replace("ValueError*", "AssertionError*")
    script = tmp_path / "mend.py"
    script.write_text(top + mend + "\n\nasync def main" + main, encoding="utf-8")
    found, *rest = sorted(run(script, valkey_url).splitlines(), reverse=True)
    assert (found, rest) == ("receipt for o-1: 0.00", rest)
    assert "1" in rest
    assert any("OrderPaid(order_id='o-1', cents=-1)" in line for line in rest)


def test_the_batch_handler_adds_up_what_it_did_not_reject(valkey_url: str, tmp_path: Path) -> None:
    code = blocks(README)
    hello = code["hello"].replace("import Bus,", "import Bus, Delivery,")
    top, _, rest = hello.partition("@event_handler")
    main = "async def main" + rest.partition("async def main")[2]
    main = main.replace("[send_receipt]", "[add_up]").replace(
        'bus.publish(OrderPaid(order_id="o-1", cents=1250))',
        "bus.publish_many([OrderPaid(order_id=str(c), cents=c) for c in (5, -1, 7)])",
    )
    script = tmp_path / "batch.py"
    script.write_text(top + code["batch"] + "\n\n" + main, encoding="utf-8")
    assert run(script, valkey_url) == "12\n"


def test_the_account_is_booked_and_renamed_once(valkey_url: str, tmp_path: Path) -> None:
    code = blocks(README)
    hello = code["hello"].replace("import Bus,", "import Bus, Delivery,")
    top, _, rest = hello.partition("@event_handler")
    main = "async def main" + rest.partition("async def main")[2]
    events = "[OrderPaid(order_id=str(c), cents=c) for c in (5, 1, 7)]"
    main = main.replace("[send_receipt]", "[book]").replace(
        'bus.publish(OrderPaid(order_id="o-1", cents=1250))', f"bus.publish_many({events})"
    )
    looks = (
        "print(await rename(bus, '7', 'Ann'), await rename(bus, '8', 'Bo'))",
        "print(sorted((await bus.redis.hgetall('account:7')).items()))",
        "print([e.event async for e in bus.history('account')])",
    )
    drained = "await worker.drained(timeout_s=10)"
    assert drained in main
    main = main.replace(drained, "\n            ".join((drained, *looks)))
    script = tmp_path / "effects.py"
    script.write_text(top + code["effects"] + "\n\n" + main, encoding="utf-8")
    assert run(script, valkey_url).splitlines() == [
        "True False",
        "[(b'cents', b'-13'), (b'name', b'Ann')]",
        "[AccountEmpty(account='7')]",
    ]


def test_the_application_is_used_as_written(valkey_url: str, tmp_path: Path) -> None:
    script = tmp_path / "application.py"
    script.write_text(blocks(README)["application"], encoding="utf-8")
    hits, balance, types = run(script, valkey_url).splitlines()
    assert (hits, balance) == ("['Loops']", "94")
    assert ast.literal_eval(types) == [
        "document.created",
        "dataset.document_added",
        "document.indexed",
        "document.deleted",
    ]


def test_the_examples_are_as_short_as_they_say() -> None:
    code = blocks(README)
    lines = {n: [x for x in c.split("\n") if x.strip()] for n, c in code.items()}
    assert len(lines["hello"]) <= 20
    assert len(lines["replay"]) <= 15


def test_the_new_event_its_handler_and_its_test_pass_as_written(tmp_path: Path) -> None:
    code = blocks(README)
    test = tmp_path / "test_sharing.py"
    test.write_text(code["event"] + code["handler"] + code["test"], encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n", encoding="utf-8")
    assert "1 passed" in (said := said_of(test)), said


def said_of(test: Path) -> str:
    """Run a file of tests as a project of its own; return what pytest printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:valkey", test],
        cwd=test.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return done.stdout + done.stderr


def test_what_the_document_of_testing_shows_passes_as_written(tmp_path: Path) -> None:
    shared, code = blocks(README), blocks((ROOT / "docs/testing.md").read_text(encoding="utf-8"))
    test = tmp_path / "test_sharing.py"
    parts = [shared["event"], shared["handler"], code["fails"], code["server"]]
    test.write_text("".join(parts), encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n", encoding="utf-8")
    assert "2 passed" in (said := said_of(test)), said
    script = tmp_path / "script.py"
    script.write_text(code["script"], encoding="utf-8")
    assert "bus:{order:0}: 1 entries" in run(script, "redis://nobody.invalid")


def test_the_session_by_hand_of_the_wire_document_goes_as_printed(url: str) -> None:
    session = blocks((ROOT / "docs/wire.md").read_text(encoding="utf-8"))["session"]
    steps = re.split(r"^127\.0\.0\.1:6379> ", session, flags=re.MULTILINE)[1:]
    entry_id = ""
    with redis.Redis.from_url(url, decode_responses=True, protocol=2) as client:
        wire = client.connection_pool.get_connection()
        for step in steps:
            command, _, printed = step.partition("\n")
            words = [w.replace("1763629200000-0", entry_id) for w in _words(command)]
            wire.send_command(*words)  # as redis-cli: redis-py would rearrange the replies
            reply = wire.read_response()
            if words[0] == "XADD":
                entry_id = reply
            for value in re.findall(r'"((?:[^"\\]|\\.)*)"', printed):
                shown = value.replace("1763629200000-0", entry_id).replace('\\"', '"')
                assert shown in _flat(reply), (command, reply)
        client.connection_pool.release(wire)
        assert client.xpending("bus:{note:0}", "by-hand")["pending"] == 0


def _words(command: str) -> list[str]:
    """Split as redis-cli does at its prompt, and shells do."""
    return shlex.split(command)


def _flat(value: object) -> list[str]:
    if isinstance(value, list | tuple):
        return [s for item in value for s in _flat(item)]
    return [str(value)]


async def test_marks_are_changed_by_hand_as_the_operations_document_says(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = blocks((ROOT / "docs/operations.md").read_text(encoding="utf-8"))["marks"]
    lines = session.splitlines()
    get, put = (_words(line.partition("> ")[2]) for line in lines[::2])
    monkeypatch.setattr(topics, "RECORD_TTL_S", 0)
    async with Bus.connect(valkey_url, topics=[Topic("order")]) as bus:
        await bus.topics.record("order")
        assert (await bus.redis.execute_command(*get)).decode() == shlex.split(lines[1])[0]
        await bus.redis.execute_command(*put)
        record = await bus.topics.record("order")
    assert (record.maxlen, record.keep, record.retention_s) == (2_000_000, 100_000, 604_800)


def test_the_backlog_is_printed_as_the_operations_document_has_it(
    valkey_url: str, tmp_path: Path
) -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    hello, backlog = tmp_path / "hello.py", tmp_path / "backlog.py"
    hello.write_text(blocks(README)["hello"], encoding="utf-8")
    backlog.write_text(blocks(text)["backlog"], encoding="utf-8")

    run(hello, valkey_url)
    first, line = run(backlog, valkey_url).splitlines()
    assert first == "order: 1 entry in 1 stream"
    assert re.fullmatch(r"  [\w-]+  nothing to do", line)


def test_observers_and_hooks_do_as_the_document_says_without_a_server(tmp_path: Path) -> None:
    script = tmp_path / "agent.py"
    script.write_text(blocks(IN_PROCESS)["agent"], encoding="utf-8")
    assert sorted(run(script, "redis://localhost:1").splitlines()) == [
        "called: clock {}",
        'called: search {"limit":10,"query":"{}"}',
        "iterated: Let me see",
        "refused: no shell here",
        "shown: Let me see",
    ]


SERVE = """
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class Quiet(WSGIRequestHandler):
    def log_message(self, *_):
        pass


server = Server(("127.0.0.1", 0), Quiet)
server.set_app(pay)
threading.Thread(target=server.serve_forever, daemon=True).start()
urls = [f"http://127.0.0.1:{server.server_port}/o-{n}" for n in range(40)]
with ThreadPoolExecutor(8) as pool:
    for entry_id in pool.map(lambda url: urllib.request.urlopen(url).read().decode(), urls):
        print(entry_id)
bus.publish_soon(OrderPaid(order_id="last", cents=1))  # and nobody waits for it
server.shutdown()
"""


async def test_sync_code_publishes_through_a_thread_as_the_document_says(
    valkey_url: str, tmp_path: Path
) -> None:
    """A WSGI server with threads; what nobody waited for is published as the program ends."""
    script = tmp_path / "shop.py"
    script.write_text(blocks(IN_PROCESS)["threads"] + SERVE, encoding="utf-8")
    entry_ids = (await asyncio.to_thread(run, script, valkey_url)).splitlines()
    async with Bus.connect(valkey_url) as bus:
        found = [(e.entry_id, e.key) async for e in bus.history("order")]
    assert found.pop()[1] == "last"
    assert sorted(entry_ids) == sorted(entry_id for entry_id, _ in found)
    assert sorted(key for _, key in found) == sorted(f"o-{n}" for n in range(40))


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/in-process.md",
        "docs/guarantees.md",
        "docs/operations.md",
        "docs/adr/README.md",
    ],
)
def test_links_and_named_tests_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    base = (ROOT / document).parent
    links = [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]
    named = re.findall(r"`(tests/[\w/.]+)`", text)
    missing = [t for t in links if not (base / t).exists()]
    missing += [t for t in named if not (ROOT / t).exists()]
    assert not missing
