from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from weightfs.config import MountConfig, default_state_dir, listen_address, mount_config, read_config
from weightfs.errors import UsageError


def write(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "weightfs.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_defaults() -> None:
    config = MountConfig(source="/srv/models", mountpoint="/models")
    assert (config.engine, config.log_level, config.deadline_s, config.attribute_timeout_s) == ("auto", "info", 30, 1)
    assert config.for_others is (os.geteuid() == 0)
    assert config.state_folder == default_state_dir("/srv/models")


def test_a_mount_may_cover_its_source_and_lie_beside_it() -> None:
    for mountpoint in ("/a", "/ab"):
        assert MountConfig(source="/a", mountpoint=mountpoint).mountpoint == mountpoint


def test_what_is_set_wins() -> None:
    for wanted in (True, False):
        assert MountConfig(source="/a", mountpoint="/b", allow_other=wanted).for_others is wanted
    assert MountConfig(source="/a", mountpoint="/b", state_dir="/state").state_folder == "/state"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"engine": "fast"}, "fast"),
        ({"engine": ""}, "auto, passthrough, portable"),
        ({"log_level": "loud"}, "loud"),
        ({"watch": "on"}, "auto, off"),
        ({"control_group": "no-such-group"}, "no-such-group"),
        ({"control_group": "nul\0"}, "no group"),
        ({"deadline_s": -1}, "deadline_s"),
        ({"attribute_timeout_s": -0.1}, "attribute_timeout_s"),
        ({"deadline_s": math.nan}, "deadline_s"),
        ({"attribute_timeout_s": math.nan}, "attribute_timeout_s"),
        ({"attribute_timeout_s": math.inf}, "attribute_timeout_s"),
        ({"metrics_listen": "9464"}, "9464"),
        ({"source": "/", "mountpoint": "/b"}, "/b: lies inside the source"),
        ({"source": "/a", "mountpoint": "/a/b/c"}, "/a/b/c: lies inside the source"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        MountConfig(**{"source": "/a", "mountpoint": "/b", **settings})
    assert named in str(caught.value)


# State folders


def test_root_keeps_its_state_in_var_lib_and_others_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert os.path.dirname(default_state_dir("/srv/models")) == "/var/lib/weightfs"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/me")
    for xdg, base in (("/xdg", "/xdg/weightfs"), ("", "/home/me/.local/state/weightfs")):
        monkeypatch.setenv("XDG_STATE_HOME", xdg)
        assert os.path.dirname(default_state_dir("/srv/models")) == base


def test_state_folders_are_told_apart_and_can_be_read() -> None:
    sources = [
        "/srv/models",
        "/srv-models",
        "/srv/models\n",
        "/",
        "/ü",
        "/\udcff",
        "/" + "x" * 300,
        "/" + "y" + "x" * 299,
    ]
    folders = [os.path.basename(default_state_dir(source)) for source in sources]
    assert len(set(folders)) == len(sources)
    assert folders[0].startswith("srv-models-")
    for folder in folders:
        assert len(folder) <= 60
        assert folder.isascii()
        assert folder.isprintable()
        assert "/" not in folder


# Addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:9464", ("::1", 9464)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert listen_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "host:x", "host:65536", "::1:80", "[::1]", "[x]:1", "a:1:2", "h:-1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        listen_address(text)


# Files


def test_a_file_has_the_same_names_with_either_dash(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'engine = "portable"\nallow-other = false\nstate_dir = "/s"\ndeadline-s = 5\nattribute_timeout_s = 0.5\n'
        'log-level = "debug"\nmetrics-listen = ":1"\ncontrol-group = "ml"\n',
    )
    assert read_config(path) == {
        "engine": "portable",
        "allow_other": False,
        "state_dir": "/s",
        "deadline_s": 5,
        "attribute_timeout_s": 0.5,
        "log_level": "debug",
        "metrics_listen": ":1",
        "control_group": "ml",
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("engin = 'auto'", "'engin'"),
        ("source = '/a'", "'source'"),
        ("mountpoint = '/a'", "'mountpoint'"),
        ("[mount]\nengine = 'auto'", "'mount'"),
        ("engine = 1", "'engine'"),
        ("engine = ['auto']", "'engine'"),
        ("allow_other = 1", "'allow_other'"),
        ("allow_other = 'yes'", "'allow_other'"),
        ("deadline_s = true", "'deadline_s'"),
        ("deadline_s = '30'", "'deadline_s'"),
        ("engine = ", "TOML"),
        ("engine = 'a'\nengine = 'b'", "TOML"),
        (b"engine = '\xff'", "TOML"),
        ("x = " + "[" * 100_000, "TOML"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_the_key(tmp_path: Path, text: str | bytes, named: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_config(path)
    assert caught.value.path == path
    assert named in caught.value.message


def test_the_keys_it_offers_are_those_it_takes(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_config(write(tmp_path, "nothing = 1"))
    offered = (caught.value.mend or "").removeprefix("keys are ").split(", ")
    assert "engine" in offered
    assert not {"source", "mountpoint"} & set(offered)


@pytest.mark.parametrize("place", ["nowhere.toml", ""])
def test_a_file_that_can_not_be_read(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match="can't read it"):
        read_config(os.path.join(tmp_path, place))


# Together


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "engine = 'portable'\ndeadline_s = 5\n")
    config = mount_config("/a", "/b", path, {"engine": "passthrough", "log_level": None, "state_dir": None})
    assert (config.engine, config.deadline_s, config.log_level) == ("passthrough", 5, "info")
    assert mount_config("/a", "/b", None, {}).engine == "auto"
    with pytest.raises(UsageError):
        mount_config("/a", "/b", write(tmp_path, "engine = 'none'"), {})


def test_places_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "name").symlink_to("real")
    (tmp_path / "place").symlink_to("elsewhere")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    config = mount_config("name", "place/mnt", None, {})
    assert config.source == str(tmp_path / "real")
    assert config.mountpoint == str(tmp_path / "elsewhere" / "mnt")
    # The mountpoint itself is not resolved: a dead mount can't be asked.
    assert mount_config("name", "name", None, {}).mountpoint == str(tmp_path / "name")
    assert mount_config("name", "name/", None, {}).mountpoint == str(tmp_path / "name")
    assert mount_config("/", "/", None, {}).mountpoint == "/"
