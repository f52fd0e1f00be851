"""The mount is the folder it shows: names, attributes, listings, symlinks."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from tests.helpers.models import every_dtype, write, write_safetensors
from tests.helpers.mounting import ENGINES, Mount, Mounter, refused

HOSTILE_NAMES = [
    b"n" * 255,
    b"new\nline",
    b"\xff\xfe not UTF-8 \x80",
    b"per%cent%2F",
    b" space ",
    b"back\\slash",
    b"-dash",
    b"*?[]$`'\"",
    b"\x01\x7f",
    "ünïcödé-模型".encode(),
    b"...",
    b".hidden",
]


def attributes(path: bytes) -> tuple[object, ...]:
    s = os.lstat(path)
    # A folder's size and link count belong to the filesystem underneath and are shown as they are.
    return (s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_uid, s.st_gid, s.st_nlink, s.st_blocks)


def walk(root: bytes) -> dict[bytes, tuple[object, ...]]:
    """Everything below a folder, by relative path."""
    found: dict[bytes, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            target = os.readlink(path) if os.path.islink(path) else None
            found[os.path.relpath(path, root)] = (*attributes(path), target)
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("source"))
    write_safetensors(f"{root}/a/model.safetensors", every_dtype())
    write(f"{root}/a/config.json", b"{}")
    write(f"{root}/a/deep/er/still/file.bin", bytes(range(256)) * 100)
    write(f"{root}/empty", b"")
    write(f"{root}/mode", b"x")
    os.chmod(f"{root}/mode", 0o640)
    os.chown(f"{root}/mode", 1234, 4321)
    os.utime(f"{root}/mode", ns=(1_000_000_123, 2_000_000_456))
    os.utime(f"{root}/empty", ns=(1, 4_000_000_000_123_456_789))  # after 2038
    os.mkdir(f"{root}/folder", 0o750)
    os.symlink("a/config.json", f"{root}/relative")
    os.symlink("../mode", f"{root}/folder/up")
    os.symlink("nowhere", f"{root}/dangling")
    os.symlink("a", f"{root}/to-folder")
    with open(f"{root}/sparse", "wb") as file:
        file.truncate(1 << 40)
    for name in HOSTILE_NAMES:
        with open(os.path.join(os.fsencode(root), b"folder", name), "wb") as file:
            file.write(name)
    return root


@pytest.fixture(scope="module", params=ENGINES)
def mount(request: pytest.FixtureRequest, source: str, module_mounter: Mounter) -> Mount:
    return module_mounter(source, request.param)


def test_walk_is_the_same_as_underneath(mount: Mount) -> None:
    bare = walk(os.fsencode(mount.source))
    assert len(bare) > 25
    for _ in range(2):  # the second one from the kernel's caches
        assert walk(os.fsencode(mount.mountpoint)) == bare
    assert attributes(os.fsencode(mount.mountpoint)) == attributes(os.fsencode(mount.source))


def test_listing_gives_types_and_numbers(mount: Mount) -> None:
    for folder in ("", "a", "folder"):
        with os.scandir(os.path.join(mount.source, folder)) as rows:
            bare = {row.name: (row.is_dir(follow_symlinks=False), row.is_symlink(), row.is_file()) for row in rows}
        with os.scandir(mount.path(folder)) as rows:
            entries = list(rows)
        assert {e.name: (e.is_dir(follow_symlinks=False), e.is_symlink(), e.is_file()) for e in entries} == bare
        for entry in entries:
            assert entry.inode() == os.lstat(entry.path).st_ino


def test_inode_numbers_are_unique(mount: Mount) -> None:
    numbers = [
        os.lstat(os.path.join(folder, name)).st_ino for folder, d, f in os.walk(mount.mountpoint) for name in d + f
    ]
    assert len(set(numbers)) == len(numbers)


def test_hostile_names_read_their_own_bytes(mount: Mount) -> None:
    folder = os.fsencode(mount.path("folder"))
    for name in HOSTILE_NAMES:
        with open(os.path.join(folder, name), "rb") as file:
            assert file.read() == name


def test_name_too_long(mount: Mount) -> None:
    with refused(errno.ENAMETOOLONG):
        os.stat(mount.path("n" * 256))


def test_files_have_the_same_bytes(mount: Mount) -> None:
    for name in ("a/model.safetensors", "a/deep/er/still/file.bin", "empty", "relative", "to-folder/config.json"):
        with open(mount.path(name), "rb") as mounted, open(os.path.join(mount.source, name), "rb") as bare:
            assert mounted.read() == bare.read()


def test_end_of_a_huge_sparse_file(mount: Mount) -> None:
    with open(mount.path("sparse"), "rb") as file:
        assert os.pread(file.fileno(), 10, (1 << 40) - 4) == bytes(4)
        assert os.pread(file.fileno(), 10, 1 << 40) == b""
        assert os.pread(file.fileno(), 10, 1 << 41) == b""


def test_statfs_is_that_of_the_source(mount: Mount) -> None:
    bare, mounted = os.statvfs(mount.source), os.statvfs(mount.path("a"))
    assert (mounted.f_bsize, mounted.f_blocks, mounted.f_namemax) == (bare.f_bsize, bare.f_blocks, 255)
    assert abs(mounted.f_bfree - bare.f_bfree) * bare.f_bsize < 4 << 30
    assert mounted.f_flag & os.ST_RDONLY


def test_mount_table(mount: Mount) -> None:
    with open("/proc/self/mounts") as table:
        row = next(line.split() for line in table if line.split()[1] == mount.mountpoint)
    assert row[:3] == [mount.source, mount.mountpoint, "fuse.weightfs"]
    assert {"ro", "allow_other", "default_permissions"} <= set(row[3].split(","))


def test_hidden_names_answer_and_are_not_listed(mount: Mount) -> None:
    for folder in ("", "a"):
        for name in (".tensors", ".npy"):
            assert name not in os.listdir(mount.path(folder))
            assert stat.S_ISDIR(os.stat(mount.path(folder, name)).st_mode)
    assert ".weightfs" not in os.listdir(mount.mountpoint)
    assert sorted(os.listdir(mount.path(".weightfs"))) == ["metrics", "status.json"]
    assert not os.path.exists(mount.path("a", ".weightfs"))
    assert not os.path.exists(mount.path("empty", ".tensors"))
    assert os.listdir(mount.path("folder", ".tensors")) == []
    with pytest.raises(NotADirectoryError):
        os.stat(mount.path("empty", ".tensors"))


def test_metrics_are_prometheus_text(mount: Mount) -> None:
    with open(mount.path(".weightfs", "metrics")) as file:
        text = file.read()
    assert f'engine="{mount.engine}"' in text
    assert "weightfs_uptime_seconds " in text


def test_status_of_live_text_is_whole(mount: Mount) -> None:
    document = mount.live()
    assert document["mountpoint"] == mount.mountpoint
    assert document["source"] == mount.source
    assert mount.status()["daemon_pid"] == mount.daemon_pid()


def test_errors_of_the_wrong_kind(mount: Mount) -> None:
    with pytest.raises(NotADirectoryError):
        os.listdir(mount.path("mode"))
    with pytest.raises(IsADirectoryError), open(mount.path("a"), "rb") as folder:
        folder.read()
    with refused(errno.EINVAL):
        os.readlink(mount.path("mode"))
    with pytest.raises(FileNotFoundError):
        os.stat(mount.path("absent"))
    with pytest.raises(FileNotFoundError):
        os.stat(mount.path("dangling"))


def test_source_xattrs_show(mount: Mount) -> None:
    os.setxattr(os.path.join(mount.source, "mode"), "user.note", b"\x00binary\xff")
    assert os.getxattr(mount.path("mode"), "user.note") == b"\x00binary\xff"
    assert "user.note" in os.listxattr(mount.path("mode"))
    with refused(errno.ENODATA):
        os.getxattr(mount.path("mode"), "user.absent")


def test_empty_library(tmp_path_factory: pytest.TempPathFactory, mounter: Mounter) -> None:
    empty = str(tmp_path_factory.mktemp("empty"))
    mount = mounter(empty)
    assert os.listdir(mount.mountpoint) == []
    assert os.listdir(mount.path(".tensors")) == []
    assert mount.live()["models"] == 0
