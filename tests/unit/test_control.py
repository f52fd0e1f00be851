"""The control socket: who may ask, what a client that misbehaves gets, what a successor finds."""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.helpers.mounting import wait_until
from tests.helpers.users import MEMBER, OWNER, STRANGER, User, as_user
from weightfs.control import LONGEST_REQUEST_BYTES, Peer, ask, bind, error_document, error_from
from weightfs.control_server import Command, ControlConfig, serve
from weightfs.errors import BusyError, IntegrityError, UnfitError, UsageError, WeightfsError

QUICK = ControlConfig(request_s=1, answer_s=1, delivery_s=1, connections=8)


async def echo(request: Mapping[str, Any], peer: Peer) -> Mapping[str, Any]:
    await trio.lowlevel.checkpoint()
    return {"request": request, "uid": peer.uid, "pid": peer.pid}


async def refuse(request: Mapping[str, Any], peer: Peer) -> Mapping[str, Any]:
    await trio.lowlevel.checkpoint()
    raise UnfitError("can't", path="/a", mend="buy one")


async def stumble(request: Mapping[str, Any], peer: Peer) -> Mapping[str, Any]:
    await trio.lowlevel.checkpoint()
    raise ZeroDivisionError


async def dawdle(request: Mapping[str, Any], peer: Peer) -> Mapping[str, Any]:
    await trio.sleep_forever()
    raise AssertionError


async def overflow(request: Mapping[str, Any], peer: Peer) -> Mapping[str, Any]:
    await trio.lowlevel.checkpoint()
    return {"much": "x" * (8 << 20)}


COMMANDS: dict[str, Command] = {
    "echo": echo, "refuse": refuse, "stumble": stumble, "dawdle": dawdle, "overflow": overflow
}  # fmt: skip


@contextlib.contextmanager
def serving(listener: socket.socket, config: ControlConfig | None = None) -> Iterator[None]:
    """A server in a thread, as the daemon has it, for the length of the block."""
    scope = trio.CancelScope()
    token: list[trio.lowlevel.TrioToken] = []
    started = threading.Event()
    failed: list[BaseException] = []

    async def main() -> None:
        token.append(trio.lowlevel.current_trio_token())
        with scope:
            started.set()
            await serve(listener, COMMANDS, config)

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as e:  # noqa: BLE001 - raised again below
            failed.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        token[0].run_sync_soon(scope.cancel)
        thread.join(10)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control")


@pytest.fixture
def listener(path: str) -> Iterator[socket.socket]:
    with bind(path, None) as bound:
        yield bound


@pytest.fixture
def group() -> grp.struct_group:
    """Any group that is not root's own."""
    return next(entry for entry in grp.getgrall() if entry.gr_gid)


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    folder = os.open(os.path.dirname(path), os.O_PATH)
    try:
        client.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)
    return client


# Asking


def test_request_and_answer(path: str, listener: socket.socket) -> None:
    with serving(listener):
        answer = ask(path, {"command": "echo", "name": "n\udcff"}, 30)
    assert answer == {
        "request": {"command": "echo", "name": "n\udcff"}, "uid": os.getuid(), "pid": os.getpid()
    }  # fmt: skip


def test_one_connection_carries_several(path: str, listener: socket.socket) -> None:
    with serving(listener), connect(path) as client, client.makefile("rwb") as both:
        both.write(b'{"command": "echo", "n": 1}\n{"command": "echo", "n": 2}\n')
        both.flush()
        assert [json.loads(both.readline())["request"]["n"] for _ in range(2)] == [1, 2]
        both.write(b'{"command": "echo", "n": 3}\n')
        both.flush()
        assert json.loads(both.readline())["request"]["n"] == 3


def test_an_error_keeps_its_class_and_its_words(path: str, listener: socket.socket) -> None:
    with serving(listener), pytest.raises(UnfitError) as caught:
        ask(path, {"command": "refuse"}, 30)
    assert (caught.value.message, caught.value.path, caught.value.mend) == ("can't", "/a", "buy one")


@pytest.mark.parametrize("kind", [WeightfsError, UsageError, UnfitError, BusyError, IntegrityError])
def test_errors_travel(kind: type[WeightfsError]) -> None:
    found = error_from(json.loads(json.dumps(error_document(kind("m", path="/p", mend="x")))))
    assert type(found) is kind
    assert found.exit_code == kind.exit_code


def test_a_command_that_fails_is_an_answer_and_a_log_entry(
    path: str, listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(listener):
        with pytest.raises(WeightfsError, match="ZeroDivisionError"):
            ask(path, {"command": "stumble"}, 30)
        assert ask(path, {"command": "echo"}, 30)
    assert "ZeroDivisionError" in caplog.text


def test_a_command_that_takes_too_long_is_given_up(path: str, listener: socket.socket) -> None:
    with serving(listener, QUICK), pytest.raises(BusyError, match="dawdle"):
        ask(path, {"command": "dawdle"}, 30)


def test_nobody_listens(path: str) -> None:
    with pytest.raises(WeightfsError, match="nobody listens"):
        ask(path, {"command": "echo"}, 1)
    bind(path, None).close()
    with pytest.raises(WeightfsError, match="nobody listens"):
        ask(path, {"command": "echo"}, 1)


def test_a_daemon_that_does_not_answer(path: str, listener: socket.socket) -> None:
    started = time.monotonic()
    with pytest.raises(BusyError, match="within"):
        ask(path, {"command": "echo"}, 0.2)
    assert time.monotonic() - started < 10


def test_a_daemon_that_ends_before_it_answers(path: str, listener: socket.socket) -> None:
    def hang_up() -> None:
        connection, _ = listener.accept()
        connection.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(BusyError, match="ended"):
        ask(path, {"command": "echo"}, 30)
    thread.join()


# Clients that misbehave


@pytest.mark.parametrize(
    "line",
    [
        b"\n", b"nonsense\n", b"[]\n", b"7\n", b"{}\n", b'{"command": 7}\n', b'{"command": "none"}\n', b"\xff\xfe\n",
        b"[" * 60_000 + b"\n", b"x" * (LONGEST_REQUEST_BYTES + 1) + b"\n", b'{"command": ["echo"]}\n',
    ],
)  # fmt: skip
def test_malformed_requests_are_answered(path: str, listener: socket.socket, line: bytes) -> None:
    with serving(listener):
        with connect(path) as client, client.makefile("rb") as answers:
            with contextlib.suppress(BrokenPipeError):
                client.sendall(line)
            assert json.loads(answers.readline())["error"]["code"] == "usage"
        assert ask(path, {"command": "echo"}, 30)


def test_a_request_without_end_is_dropped(path: str, listener: socket.socket) -> None:
    with serving(listener), connect(path) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                client.sendall(b"x" * (1 << 16))
        assert ask(path, {"command": "echo"}, 30)


def test_a_client_that_asks_too_much_is_told_so(path: str) -> None:
    with pytest.raises(UsageError, match="too long"):
        ask(path, {"command": "x" * LONGEST_REQUEST_BYTES}, 30)


@pytest.mark.parametrize("begun", [b"", b'{"command": "ec'])
def test_slow_clients_are_dropped(path: str, listener: socket.socket, begun: bytes) -> None:
    with serving(listener, QUICK), connect(path) as client:
        client.sendall(begun)
        assert ask(path, {"command": "echo"}, 30)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_a_client_that_takes_no_answer_is_dropped(path: str, listener: socket.socket) -> None:
    with serving(listener, QUICK), connect(path) as client:
        client.sendall(b'{"command": "overflow"}\n')
        assert ask(path, {"command": "echo"}, 30)

        def is_dropped() -> bool:
            try:
                client.send(b" ")
            except (BrokenPipeError, ConnectionResetError):
                return True
            return False

        wait_until(is_dropped, "the server hangs up")


def test_a_hundred_idle_clients_hold_nobody_up(path: str, listener: socket.socket) -> None:
    with serving(listener), contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(connect(path))
        started = time.monotonic()
        assert ask(path, {"command": "echo"}, 30)
        assert time.monotonic() - started < 4


def test_more_idle_clients_than_there_is_room_for_hold_others_up_for_a_moment(
    path: str, listener: socket.socket
) -> None:
    with serving(listener, QUICK), contextlib.ExitStack() as stack:
        for _ in range(3 * QUICK.connections):
            stack.enter_context(connect(path))
        assert ask(path, {"command": "echo"}, 30)


def test_clients_that_leave_are_forgotten(path: str, listener: socket.socket) -> None:
    with serving(listener, QUICK):
        for _ in range(5 * QUICK.connections):
            with connect(path) as client:
                client.sendall(b'{"command": "overflow"}\n')
        assert ask(path, {"command": "echo"}, 30)


# Binding


def test_two_servers_share_a_listener(path: str, listener: socket.socket) -> None:
    """A daemon and its successor: at no moment does a client find nobody."""
    with serving(listener):
        with listener.dup() as second, serving(second):
            assert all(ask(path, {"command": "echo", "n": n}, 30)["request"]["n"] == n for n in range(20))
        assert ask(path, {"command": "echo"}, 30)
    assert listener.fileno() >= 0


def test_what_a_dead_daemon_left_is_replaced(path: str) -> None:
    bind(path, None).close()
    with bind(path, None) as listener, serving(listener):
        assert ask(path, {"command": "echo"}, 30)
    assert os.listdir(os.path.dirname(path)) == ["control"]


def test_a_living_one_is_not(path: str, listener: socket.socket) -> None:
    with pytest.raises(BusyError, match="already"):
        bind(path, None)
    with serving(listener):
        assert ask(path, {"command": "echo"}, 30)


def test_nothing_but_a_socket_is_replaced(path: str) -> None:
    Path(path).write_text("mine")
    with pytest.raises(UsageError, match="no socket"):
        bind(path, None)
    assert Path(path).read_text() == "mine"


def test_paths_may_be_long(tmp_path: Path) -> None:
    folder = tmp_path
    while len(str(folder)) < 300:
        folder /= "a-long-folder-name"
    folder.mkdir(parents=True)
    path = str(folder / "control")
    with bind(path, None) as listener, serving(listener):
        assert ask(path, {"command": "echo"}, 30)
    with pytest.raises(UsageError, match="64 bytes"):
        bind(str(folder / ("n" * 65)), None)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(WeightfsError, match="No such file"):
        bind(str(tmp_path / "none" / "control"), None)
    with pytest.raises(WeightfsError, match="nobody listens"):
        ask(str(tmp_path / "none" / "control"), {"command": "echo"}, 1)


# Who may ask


def may_ask(user: User, folder: Path) -> bool:
    code = """
with socket.socket(socket.AF_UNIX) as client:
    result = answer(client.connect, "state/control")
    if result is None:
        client.sendall(b'{"command": "echo"}\\n')
        result = json.loads(client.makefile("rb").readline())
"""
    answer = as_user(user, str(folder), code)
    if isinstance(answer, dict):
        assert answer["uid"] == user.uid
        return True
    assert answer == f"errno {errno.EACCES}"
    return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state folder as the daemon makes it, in one that everyone may enter."""
    tmp_path.chmod(0o755)
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path


def test_without_a_group_only_the_owner_may(folder: Path) -> None:
    with bind(str(folder / "state/control"), None) as listener, serving(listener):
        assert stat.S_IMODE(os.stat(folder / "state/control").st_mode) == 0o600
        (folder / "state").chmod(0o755)
        assert may_ask(User(0, 0), folder)
        assert not any(may_ask(user, folder) for user in (OWNER, MEMBER, STRANGER))


def test_with_a_group_its_members_may(folder: Path, group: grp.struct_group) -> None:
    (folder / "state/index").touch(mode=0o600)
    with bind(str(folder / "state/control"), group.gr_name) as listener, serving(listener):
        entry = os.stat(folder / "state/control")
        assert (stat.S_IMODE(entry.st_mode), entry.st_gid) == (0o660, group.gr_gid)
        assert may_ask(User(0, 0), folder)
        assert may_ask(User(1235, 1235, (group.gr_gid,)), folder)
        assert not may_ask(STRANGER, folder)
    # It may come through to the socket, and neither list nor change what else is there.
    entry = os.stat(folder / "state")
    assert (stat.S_IMODE(entry.st_mode), entry.st_gid) == (0o710, group.gr_gid)


@pytest.mark.parametrize("name", ["no-such-group", "", "nul\0"])
def test_a_group_that_does_not_exist(path: str, name: str) -> None:
    with pytest.raises(UsageError, match="no group"):
        bind(path, name)
    assert not os.path.lexists(path)
