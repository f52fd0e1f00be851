"""`mount.weightfs`, as mount(8) and fstab call it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from weightfs.cli import mount_helper
from weightfs.config import MountConfig
from weightfs.errors import BusyError, UsageError


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ([], {}),
        (["-o", "rw"], {}),
        (["-o", "ro,nosuid,nodev,_netdev,nofail,x-systemd.automount,comment=mine"], {}),
        (["-s", "-n", "-v", "-f", "-t", "weightfs"], {}),
        (["-o", "engine=portable,state-dir=/s"], {"engine": "portable", "state_dir": "/s"}),
        (["-o", "log_level=debug,watch=off"], {"log_level": "debug", "watch": "off"}),
        (["-o", "control-group=ml"], {"control_group": "ml"}),
        (["-o", "deadline-s=2.5,attribute_timeout_s=0"], {"deadline_s": 2.5, "attribute_timeout_s": 0.0}),
        (["-o", "allow_other"], {"allow_other": True}),
        (["-o", "no-allow-other,"], {"allow_other": False}),
        (["-o", "engine=auto", "-o", "engine=portable"], {"engine": "portable"}),
        (["-o"], {}),
        (["-o", "metrics_listen=[::1]:9464"], {"metrics_listen": "[::1]:9464"}),
    ],
)  # fmt: skip
def test_arguments(arguments: list[str], settings: dict[str, Any]) -> None:
    assert mount_helper.parse(["/srv/models", "/models", *arguments]) == ("/srv/models", "/models", None, settings)
    assert mount_helper.parse([*arguments[:0], "/srv/models", *arguments[:0], "/models", *arguments])[3] == settings


def test_a_configuration_file() -> None:
    assert mount_helper.parse(["/a", "/b", "-o", "config=/etc/weightfs.toml"])[2] == "/etc/weightfs.toml"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "a source and a mountpoint"),
        (["/a"], "a source and a mountpoint"),
        (["/a", "/b", "/c"], "a source and a mountpoint"),
        (["/a", "/b", "-x"], "'-x'"),
        (["/a", "/b", "-o", "speed=fast"], "'speed=fast'"),
        (["/a", "/b", "-o", "deadline_s=soon"], "'soon'"),
        (["/a", "/b", "-o", "source=/c"], "'source=/c'"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        mount_helper.parse(arguments)
    assert named in str(caught.value)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[MountConfig]:
    seen: list[MountConfig] = []
    monkeypatch.setattr(mount_helper, "start", seen.append)
    return seen


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mount.weightfs", *arguments])
    try:
        mount_helper.main()
    except SystemExit as e:
        return int(e.code or 0)
    return 0


def test_it_mounts(monkeypatch: pytest.MonkeyPatch, started: list[MountConfig]) -> None:
    assert run(monkeypatch, "/srv", "/mnt", "-o", "rw,engine=portable") == 0
    (config,) = started
    assert (config.source, config.mountpoint, config.engine) == ("/srv", "/mnt", "portable")


def test_a_fake_mount_mounts_nothing(monkeypatch: pytest.MonkeyPatch, started: list[MountConfig]) -> None:
    assert run(monkeypatch, "/srv", "/mnt", "-f") == 0
    assert not started


@pytest.mark.parametrize("arguments", [["/srv"], ["/srv", "/mnt", "-o", "engine=none"], ["/srv", "/mnt", "-o", "x=y"]])
def test_a_failure_is_mounts_own_status_and_one_line(
    monkeypatch: pytest.MonkeyPatch,
    started: list[MountConfig],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    assert run(monkeypatch, *arguments) == 32
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("weightfs: ")
    assert said.err.count("\n") == 1
    assert not started


def test_a_daemon_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_: MountConfig) -> None:
        raise BusyError("did not serve")

    monkeypatch.setattr(mount_helper, "start", busy)
    assert run(monkeypatch, "/srv", "/mnt") == 32
