"""The log stays bounded and whole, whoever writes to it and whoever else rotates it."""

from __future__ import annotations

import logging
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.support import open_descriptors, python
from weightfs.logs import LogFile, Sparing

WRITER = """
import logging, sys
from weightfs.logs import LogFile
path, who, lines, longest = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
handler = LogFile(path, longest_bytes=longest, kept=200)
logging.getLogger().addHandler(handler)
print("ready", flush=True)
sys.stdin.readline()
for number in range(lines):
    logging.warning("%s %d %s", who, number, "x" * (number % 90))
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "weightfs.log")


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    made = logging.Logger("test")  # noqa: LOG001 - one of its own, that no other test's handlers hear
    yield made
    for handler in made.handlers:
        handler.close()


def handler(path: str, longest_bytes: int = 1000, kept: int = 3) -> LogFile:
    made = LogFile(path, longest_bytes=longest_bytes, kept=kept)
    made.setFormatter(logging.Formatter("%(message)s"))
    return made


def texts(path: str) -> list[str]:
    """The log and its predecessors, oldest first."""
    folder, name = os.path.split(path)
    older = [entry for entry in os.listdir(folder) if re.fullmatch(re.escape(name) + r"\.\d+", entry)]
    names = [*sorted(older, key=lambda entry: -int(entry.rpartition(".")[2])), name]
    return [Path(folder, entry).read_text() for entry in names if Path(folder, entry).exists()]


def test_it_is_for_its_owner_alone(path: str, logger: logging.Logger) -> None:
    logger.addHandler(handler(path))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_it_is_put_aside_when_long(path: str, logger: logging.Logger) -> None:
    logger.addHandler(handler(path))
    for number in range(1000):
        logger.warning("%05d", number)
    found = texts(path)
    assert len(found) == 4
    assert all(len(text) == 1002 for text in found[:-1])
    assert len(found[-1]) < 1000
    lines = "".join(found).split()
    assert lines == [f"{number:05}" for number in range(1000 - len(lines), 1000)]


def test_none_is_kept_if_so_wished(path: str, logger: logging.Logger) -> None:
    logger.addHandler(handler(path, kept=0))
    for number in range(500):
        logger.warning("%05d", number)
    assert len(texts(path)) == 1
    assert len(texts(path)[0]) < 1000


def test_several_processes_lose_no_line_and_mix_none(path: str) -> None:
    lines = 3000
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, path, who, str(lines), "20000"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for who in "abcd"
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    for writer in writers:
        writer.communicate("\n")
        assert writer.returncode == 0
    found = texts(path)
    assert len(found) > 10
    assert all(20_000 <= len(text) < 22_000 for text in found[:-1])
    seen: dict[str, list[int]] = {who: [] for who in "abcd"}
    for line in "".join(found).splitlines():
        parts = re.fullmatch(r"[-0-9:, ]+ WARNING \d+ root: ([abcd]) (\d+) (x*)", line)
        assert parts is not None, line
        assert len(parts[3]) == int(parts[2]) % 90
        seen[parts[1]].append(int(parts[2]))
    for who, numbers in seen.items():
        # Several processes may be a line apart at the moment of a rename, so order holds within a file only.
        assert sorted(numbers) == list(range(lines)), who


def test_a_rename_by_others_is_followed(path: str, logger: logging.Logger) -> None:
    logger.addHandler(handler(path))
    logger.warning("one")
    os.rename(path, path + ".old")
    logger.warning("two")
    os.unlink(path)
    logger.warning("three")
    assert Path(path + ".old").read_text() == "one\n"
    assert Path(path).read_text() == "three\n"


def test_a_truncation_by_others_leaves_no_hole(path: str, logger: logging.Logger) -> None:
    """logrotate's copytruncate."""
    logger.addHandler(handler(path))
    logger.warning("x" * 500)
    os.truncate(path, 0)
    logger.warning("two")
    assert Path(path).read_bytes() == b"two\n"


def test_standard_error_follows(path: str) -> None:
    code = """
import logging, os, sys
from weightfs.logs import LogFile
log = logging.Logger("test")
log.addHandler(LogFile(sys.argv[1], longest_bytes=100, kept=1, also=2))
log.warning("x" * 200)
log.warning("new file")
os.write(2, b"said by the interpreter\\n")
"""
    done = python(code, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(path).read_text().endswith("new file\nsaid by the interpreter\n")


def test_hostile_messages_are_one_bounded_line(path: str, logger: logging.Logger) -> None:
    logger.addHandler(handler(path, longest_bytes=1 << 20))
    logger.warning("%s", "n\udcff" + "x" * 1_000_000)
    assert Path(path).read_bytes().startswith(b"n\\udcffxxx")
    assert os.path.getsize(path) == (64 << 10) + 1


def test_a_disk_that_is_full_ends_nothing(
    path: str, logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink("/dev/full", path)
    logger.addHandler(handler(path))
    logger.warning("one")
    assert "No space left" in capsys.readouterr().err


def test_no_descriptor_is_left(path: str, logger: logging.Logger) -> None:
    before = open_descriptors()
    made = handler(path, longest_bytes=100)
    logger.addHandler(made)
    for number in range(200):
        logger.warning("%d", number)
    made.close()
    made.close()
    assert open_descriptors() == before
    logger.removeHandler(made)


# Sparing


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def kept(logger: logging.Logger) -> Kept:
    made = Kept()
    made.addFilter(Sparing(burst=3, per_s=60))
    logger.addHandler(made)
    return made


def test_repetitions_are_left_out(logger: logging.Logger, kept: Kept) -> None:
    for number in range(1000):
        logger.warning("request %d failed", number)
        logger.warning("another thing")
    assert kept.lines == [
        line for number in range(3) for line in (f"request {number} failed", "another thing")
    ]  # fmt: skip


def test_what_was_left_out_is_said_later(logger: logging.Logger, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("weightfs.logs.time.monotonic", lambda: now[0])
    for number in range(10):
        logger.warning("request %d failed", number)
    now[0] += 61
    logger.warning("request %d failed", 10)
    logger.warning("request %d failed", 11)
    assert kept.lines[3:] == ["request 10 failed (7 more like it in the 60 s before)", "request 11 failed"]


def test_the_end_of_a_process_always_passes(logger: logging.Logger, kept: Kept) -> None:
    for _ in range(10):
        logger.critical("ending")
    assert len(kept.lines) == 10


def test_many_kinds_take_no_memory(logger: logging.Logger, kept: Kept) -> None:
    for number in range(5000):
        logger.warning(f"made up {number}")  # noqa: G004 - what no code should do
    assert len(kept.filters[0]._seen) <= 256  # type: ignore[union-attr]


def test_a_process_logs_there_and_nowhere_else(path: str) -> None:
    code = """
import logging, sys
from weightfs.logs import log_to
logging.basicConfig()
log_to(sys.argv[1], "info")
log_to(sys.argv[1], "info")
logging.getLogger("weightfs.test").info("here")
logging.getLogger("weightfs.test").debug("not here")
"""
    done = python(code, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (line,) = Path(path).read_text().splitlines()
    assert re.search(r" INFO \d+ weightfs\.test: here$", line)
