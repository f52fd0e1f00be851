"""Three users and root: what each may do through the mount is what he may do on the bare folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
from typing import Any

import pytest

from tests.helpers.models import every_dtype, write, write_safetensors
from tests.helpers.mounting import ENGINES, Mount, Mounter, wait_until
from tests.helpers.users import (
    FILES_GROUP,
    GROUP,
    GROUP_OBJ,
    MASK,
    MEMBER,
    OTHER,
    OWNER,
    ROOT,
    STRANGER,
    USER,
    USER_OBJ,
    User,
    access_list,
    as_user,
)

USERS = {"owner": OWNER, "member": MEMBER, "stranger": STRANGER, "root": ROOT}
every_user = pytest.mark.parametrize("user", USERS.values(), ids=USERS)
FILE_MODES = (0o600, 0o640, 0o644, 0o604, 0o444, 0o440, 0o060, 0o004, 0o000, 0o755, 0o711, 0o666)
FOLDER_MODES = (0o700, 0o750, 0o755, 0o711, 0o744, 0o705, 0o070, 0o1777, 0o2775, 0o000)

# Every call that depends on rights, on every entry down to the folders' own files.
LOOK = """
result = {}
def look(path):
    result[path] = {
        "stat": answer(attributes, path),
        "content": answer(content, path),
        "list": answer(lambda: sorted(os.listdir(path))),
        "link": answer(os.readlink, path),
        "tag": answer(lambda: os.getxattr(path, "user.tag").decode()),
        "trusted tag": answer(lambda: os.getxattr(path, "trusted.tag").decode()),
        "access list": answer(lambda: os.getxattr(path, "system.posix_acl_access").hex()),
        "default list": answer(lambda: os.getxattr(path, "system.posix_acl_default").hex()),
        "attribute names": answer(lambda: [name for name in sorted(os.listxattr(path)) if name != "trusted.tag"]),
        "may read": os.access(path, os.R_OK),
        "may run": os.access(path, os.X_OK),
    }
for name in os.listdir("."):
    look(name)
    if stat.S_ISDIR(os.lstat(name).st_mode):
        for below in ("inside", "link", "nothing"):
            look(name + "/" + below)
"""


def belongs(path: str) -> str:
    os.chown(path, OWNER.uid, FILES_GROUP, follow_symlinks=False)
    return path


def make_folder(path: str, mode: int) -> None:
    os.mkdir(path)
    os.chmod(belongs(write(f"{path}/inside", b"inside")), 0o644)
    os.symlink("inside", f"{path}/link")
    os.chmod(belongs(path), mode)


def make_lists(root: str) -> None:
    """Files and folders whose access lists say something else than their modes."""
    entries: dict[str, tuple[tuple[int, int] | tuple[int, int, int], ...]] = {
        "admits-a-stranger": ((USER_OBJ, 6), (USER, 4, STRANGER.uid), (GROUP_OBJ, 0), (MASK, 4), (OTHER, 0)),
        "denies-a-member": ((USER_OBJ, 6), (USER, 0, MEMBER.uid), (GROUP_OBJ, 4), (MASK, 4), (OTHER, 0)),
        "denies-a-user": ((USER_OBJ, 6), (USER, 0, STRANGER.uid), (GROUP_OBJ, 4), (MASK, 4), (OTHER, 4)),
        "admits-a-group": ((USER_OBJ, 6), (GROUP_OBJ, 0), (GROUP, 4, STRANGER.gid), (MASK, 4), (OTHER, 0)),
        "mask-takes-away": ((USER_OBJ, 6), (USER, 6, STRANGER.uid), (GROUP_OBJ, 6), (MASK, 0), (OTHER, 0)),
    }
    for name, acl in entries.items():
        access_list(belongs(write(f"{root}/{name}", b"listed")), *acl)
    make_folder(f"{root}/folder-admits-a-stranger", 0o700)
    access_list(
        f"{root}/folder-admits-a-stranger",
        *((USER_OBJ, 7), (USER, 5, STRANGER.uid), (GROUP_OBJ, 0), (MASK, 5), (OTHER, 0)),
    )
    make_folder(f"{root}/folder-denies-a-member", 0o750)
    access_list(
        f"{root}/folder-denies-a-member",
        *((USER_OBJ, 7), (USER, 0, MEMBER.uid), (GROUP_OBJ, 5), (MASK, 5), (OTHER, 0)),
    )
    make_folder(f"{root}/folder-hands-down", 0o755)
    access_list(
        f"{root}/folder-hands-down",
        *((USER_OBJ, 6), (USER, 4, STRANGER.uid), (GROUP_OBJ, 0), (MASK, 4), (OTHER, 0)),
        default=True,
    )
    os.unlink(f"{root}/folder-hands-down/inside")
    belongs(write(f"{root}/folder-hands-down/inside", b"with what the folder hands down"))


@pytest.fixture(scope="module", params=ENGINES)
def mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, module_mounter: Mounter) -> Mount:
    root = str(tmp_path_factory.mktemp("source"))
    os.chmod(root, 0o755)
    for mode in FILE_MODES:
        path = belongs(write(f"{root}/file-{mode:04o}", b"content"))
        os.setxattr(path, "user.tag", b"tag")
        os.setxattr(path, "trusted.tag", b"for CAP_SYS_ADMIN alone")
        os.chmod(path, mode)
        os.symlink(os.path.basename(path), f"{root}/link-to-{mode:04o}")
    for mode in FOLDER_MODES:
        make_folder(f"{root}/folder-{mode:04o}", mode)
        os.symlink(f"folder-{mode:04o}/inside", f"{root}/link-into-{mode:04o}")
    os.chmod(write(f"{root}/roots-own", b"x"), 0o640)
    make_lists(root)
    return module_mounter(root, request.param)


@every_user
def test_rights_are_those_of_the_bare_folder(mount: Mount, user: User) -> None:
    bare: dict[str, Any] = as_user(user, mount.source, LOOK)
    seen: dict[str, Any] = as_user(user, mount.mountpoint, LOOK)
    assert {path: seen[path] for path in bare if seen.get(path) != bare[path]} == {}
    assert seen.keys() == bare.keys()


def test_the_table_holds_both_answers(mount: Mount) -> None:
    """Or the comparison above would compare nothing."""
    granted = {
        name: {p for p, rights in as_user(user, mount.mountpoint, LOOK).items() if len(rights["content"]) == 64}
        for name, user in USERS.items()
    }
    for path, who in {
        "file-0600": {"owner", "root"},
        "file-0640": {"owner", "member", "root"},
        "file-0604": {"owner", "stranger", "root"},
        "file-0004": {"stranger", "root"},
        "file-0000": {"root"},
        "folder-0700/inside": {"owner", "root"},
        "folder-0711/inside": {"owner", "member", "stranger", "root"},
        "folder-0744/inside": {"owner", "root"},
        "admits-a-stranger": {"owner", "stranger", "root"},
        "denies-a-member": {"owner", "root"},
        "denies-a-user": {"owner", "member", "root"},
        "admits-a-group": {"owner", "stranger", "root"},
        "mask-takes-away": {"owner", "root"},
        "folder-admits-a-stranger/inside": {"owner", "stranger", "root"},
        "folder-denies-a-member/inside": {"owner", "root"},
        "folder-hands-down/inside": {"owner", "stranger", "root"},
    }.items():
        assert {name for name in USERS if path in granted[name]} == who, path


@every_user
def test_nobody_writes(mount: Mount, user: User) -> None:
    """Where the bare folder would let him write, the mount says that it is read-only; elsewhere either refusal."""
    code = """
result = [
    answer(os.open, "file-0666", os.O_WRONLY),
    answer(os.open, "file-0666", os.O_RDWR | os.O_TRUNC),
    answer(os.open, "folder-1777/new", os.O_WRONLY | os.O_CREAT),
    answer(os.mkdir, "folder-1777/new"),
    answer(os.access, "file-0666", os.W_OK),
]
"""
    assert as_user(user, mount.mountpoint, code) == [*[f"errno {errno.EROFS}"] * 4, False]


def test_the_mount_is_read_only_without_devices_and_without_setuid(mount: Mount) -> None:
    with open("/proc/self/mountinfo") as table:
        (line,) = [line for line in table if line.split(" ")[4] == mount.mountpoint]
    options = line.split(" ")[5].split(",")
    assert {"ro", "nosuid", "nodev"} <= set(options)
    # The superblock's own options: what the kernel checks callers with.
    assert {"ro", "default_permissions", "allow_other"} <= set(line.split(" - ")[1].split(" ")[2].strip().split(","))


def test_a_setuid_program_does_not_elevate(mount: Mount) -> None:
    program = shutil.which("id")
    assert program is not None
    shutil.copy(program, f"{mount.source}/id")
    os.chmod(f"{mount.source}/id", 0o4755)
    code = "result = subprocess.run(['./id', '-u'], capture_output=True, text=True).stdout.strip()"
    assert as_user(STRANGER, mount.mountpoint, code) == str(STRANGER.uid)


def test_a_device_does_not_open(mount: Mount) -> None:
    os.mknod(f"{mount.source}/null", 0o20666, os.makedev(1, 3))
    try:
        for user in (ROOT, STRANGER):
            assert as_user(user, mount.mountpoint, "result = answer(content, 'null')") == f"errno {errno.EACCES}"
    finally:
        os.unlink(f"{mount.source}/null")


def test_rights_taken_away_are_gone_within_a_second(mount: Mount) -> None:
    path = belongs(write(f"{mount.source}/folder-0755/fleeting", b"x"))
    os.chmod(path, 0o644)
    code = "result = answer(content, 'folder-0755/fleeting')"
    wait_until(lambda: len(as_user(STRANGER, mount.mountpoint, code)) == 64, "the file shows")
    os.chmod(path, 0o600)
    denied = f"errno {errno.EACCES}"
    wait_until(lambda: as_user(STRANGER, mount.mountpoint, code) == denied, "the file is shut")
    os.chmod(path, 0o644)
    wait_until(lambda: len(as_user(STRANGER, mount.mountpoint, code)) == 64, "it is open again")
    os.unlink(path)


@every_user
def test_names_of_attributes_for_root_are_listed_to_nobody(mount: Mount, user: User) -> None:
    """The bare folder lists them to root, which may read them here too, by name."""
    code = "result = [answer(os.listxattr, 'file-0644'), answer(lambda: len(os.getxattr('file-0644', 'trusted.tag')))]"
    names, value = as_user(user, mount.mountpoint, code)
    assert names == ["user.tag"]
    assert value == (len(b"for CAP_SYS_ADMIN alone") if user is ROOT else f"errno {errno.ENODATA}")


def test_the_source_folder_itself_counts(mount: Mount) -> None:
    code = "result = answer(content, 'file-0644')"
    assert len(as_user(STRANGER, mount.mountpoint, code)) == 64
    os.chmod(mount.source, 0o700)
    try:
        wait_until(lambda: not may_enter(STRANGER, mount.mountpoint), "the mountpoint is shut")
        assert may_enter(ROOT, mount.mountpoint)
    finally:
        os.chmod(mount.source, 0o755)
    wait_until(lambda: may_enter(STRANGER, mount.mountpoint), "it is open again")


def may_enter(user: User, folder: str) -> bool:
    return bool(as_user(user, folder, "result = os.access('.', os.X_OK)"))


# Views: who may read a tensor is who may read its file where it lies.


@pytest.fixture(scope="module", params=ENGINES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, module_mounter: Mounter) -> Mount:
    root = str(tmp_path_factory.mktemp("models"))
    os.chmod(root, 0o755)
    for mode in (0o600, 0o640, 0o644, 0o604):
        belongs(os.path.dirname(path := write_safetensors(f"{root}/file-{mode:04o}/model.safetensors", every_dtype())))
        os.chmod(belongs(path), mode)
    for mode in (0o700, 0o750, 0o755, 0o711, 0o744):
        belongs(path := write_safetensors(f"{root}/folder-{mode:04o}/model.safetensors", every_dtype()))
        os.chmod(path, 0o644)
        os.chmod(belongs(os.path.dirname(path)), mode)
    for name, acl in {
        "listed": ((USER_OBJ, 6), (USER, 0, MEMBER.uid), (GROUP_OBJ, 4), (MASK, 4), (OTHER, 0)),
        "admitted": ((USER_OBJ, 6), (USER, 4, STRANGER.uid), (GROUP_OBJ, 0), (MASK, 4), (OTHER, 0)),
    }.items():
        access_list(belongs(write_safetensors(f"{root}/{name}/model.safetensors", every_dtype())), *acl)
    # Hugging Face's layout: the file lies in another folder, which not everyone may enter.
    belongs(path := write_safetensors(f"{root}/blobs/digest", every_dtype()))
    os.chmod(path, 0o644)
    os.chmod(belongs(f"{root}/blobs"), 0o750)
    os.mkdir(f"{root}/snapshot")
    os.symlink("../blobs/digest", f"{root}/snapshot/model.safetensors")
    # One shard for everyone, one for the owner alone.
    for number, mode in ((1, 0o644), (2, 0o600)):
        path = f"{root}/mixed/model-{number:05}-of-00002.safetensors"
        belongs(write_safetensors(path, {f"tensor-{number}": every_dtype()["t.F32"]}))
        os.chmod(path, mode)
    return module_mounter(root, request.param)


MODEL_FOLDERS = (
    *(f"file-{mode:04o}" for mode in (0o600, 0o640, 0o644, 0o604)),
    *(f"folder-{mode:04o}" for mode in (0o700, 0o750, 0o755, 0o711, 0o744)),
    "listed", "admitted", "snapshot",
)  # fmt: skip


@every_user
def test_a_tensor_opens_to_whom_its_file_opens(models: Mount, user: User) -> None:
    code = f"""
result = {{}}
for folder in {MODEL_FOLDERS!r}:
    result[folder] = [
        len(answer(content, folder + "/model.safetensors")) == 64,
        len(answer(content, folder + "/.tensors/model/t.F32")) == 64,
        len(answer(content, folder + "/.npy/model/t.F32.npy")) == 64,
        len(answer(os.listdir, folder + "/.tensors/model")) == {len(every_dtype())},
        answer(os.getxattr, folder + "/.tensors/model/t.F32", "user.weightfs.dtype") == b"F32",
    ]
"""
    for folder, (readable, raw, npy, names, dtype) in as_user(user, models.mountpoint, code).items():
        assert [raw, npy, names, dtype] == [readable] * 4, folder


@every_user
def test_a_shard_for_its_owner_alone_shuts_the_set(models: Mount, user: User) -> None:
    """The set's listing tells the names in every shard, so it is for who may read them all."""
    code = "result = [answer(os.listdir, 'mixed/.tensors/model'), answer(content, 'mixed/.tensors/model/tensor-2')]"
    names, tensor = as_user(user, models.mountpoint, code)
    if user in (OWNER, ROOT):
        assert sorted(names) == ["tensor-1", "tensor-2"]
        assert len(tensor) == 64
    else:
        assert (names, tensor) == (f"errno {errno.EACCES}",) * 2


@every_user
def test_live_state_is_for_everyone(models: Mount, user: User) -> None:
    code = "result = [open('.weightfs/status.json').read(), sorted(os.listdir('.weightfs'))]"
    text, names = as_user(user, models.mountpoint, code)
    assert json.loads(text)["engine"] == models.engine
    assert names == ["metrics", "status.json"]
