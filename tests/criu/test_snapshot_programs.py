"""A library that a process has mapped is another one when it is restored: refused by name, before anything is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.processes import process, start_ticks
from checkpoint.programs import build_id_of, mapped
from tests.helpers.served import Commands
from tests.helpers.targets import needs_criu, target

pytestmark = needs_criu

LOADER = """
import ctypes
library = ctypes.CDLL(sys.argv[2])
while True:
    tell(library.adler32(1, b"x", 1))
    wait()
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    made = Commands(tmp_path)
    yield made
    made.close()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    import zlib  # noqa: F401 - maps it

    found = next(path for path in mapped([process(os.getpid())]) if os.path.basename(path).startswith("libz."))
    return Path(shutil.copy(found, tmp_path / "libcopy.so"))


@pytest.mark.parametrize("has_build_id", [True, False])
def test_a_library_that_was_upgraded(has_build_id: bool, library: Path, tmp_path: Path, commands: Commands) -> None:
    content = library.read_bytes()
    if not has_build_id:
        content = content.replace(b"GNU\0" + bytes.fromhex(build_id_of(str(library))), b"NOT\0" + bytes(20))
        library.write_bytes(content)
    assert bool(build_id_of(str(library))) is has_build_id
    with target(LOADER, tmp_path, str(library)) as one:
        before = one.said()
        commands.told("create", "warm", "--pid", str(one.pid))
        one.process.wait(10)
        other = content[:-1] + bytes([content[-1] ^ 1])
        if has_build_id:
            old = bytes.fromhex(build_id_of(str(library)))
            other = content.replace(old, old[::-1])
        library.unlink()
        library.write_bytes(other)
        library.chmod(0o644)
        error = commands.refused("restore", "warm", code=3)
        assert f"{library} here: " in error["message"]
        assert start_ticks(one.pid) is None
        library.unlink()
        library.write_bytes(content)
        library.chmod(0o644)
        commands.told("restore", "warm")
        assert one.ask() == before
