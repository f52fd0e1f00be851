"""What differs between machines, and whether it matters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from checkpoint.errors import MisfitError
from checkpoint.fingerprint import Difference, Fingerprint, Gpu, compare, image_of, parse_cpuinfo, require_fit
from tests.helpers.snapshots import FINGERPRINT

H100 = Gpu(model="NVIDIA H100 80GB HBM3", memory_bytes=80 << 30)
HALF = Gpu(model="NVIDIA H100 80GB HBM3", memory_bytes=40 << 30)
H200 = Gpu(model="NVIDIA H200", memory_bytes=141 << 30)


def differences(uses_gpu: bool = True, **here: Any) -> list[Difference]:
    return compare(FINGERPRINT, msgspec.structs.replace(FINGERPRINT, **here), uses_gpu=uses_gpu)


def test_a_machine_fits_itself() -> None:
    assert differences() == []
    require_fit("warm", [])


@pytest.mark.parametrize(
    ("change", "what", "matters"),
    [
        ({"architecture": "aarch64"}, "architecture", True),
        ({"page_bytes": 65536}, "page size", True),
        ({"cpu": "another"}, "processor", False),
        ({"cpu_features": ["sse2", "xsave"]}, "CPU features", True),
        ({"cpu_features": ["avx2", "avx512f", "sse2", "xsave"]}, "more CPU flags", False),
        ({"kernel": "6.17.99"}, "kernel", True),
        ({"kernel": "5.19"}, "kernel", True),
        ({"kernel": "6.18.1-other"}, "kernel", False),
        ({"kernel": "7.0.0"}, "kernel", False),
        ({"criu": "4.1.0"}, "CRIU", True),
        ({"criu": "4.10.0"}, "CRIU", False),
        ({"driver": "570.2"}, "GPU driver", True),
        ({"driver": None}, "GPU driver", True),
        ({"gpus": []}, "GPUs", True),
        ({"gpus": [H200]}, "GPUs", True),
        ({"gpus": [HALF]}, "GPUs", True),
        ({"gpus": [H200, H100]}, "GPUs", False),
        ({"image": "sha256:1"}, "container image", True),
        ({"mountpoint": "/elsewhere"}, "mountpoint", True),
        ({"mountpoint": None}, "mountpoint", True),
        ({"command": ["server", "--port", "8001"]}, "command", True),
    ],
)
def test_each_difference_is_told_with_its_weight(change: dict[str, Any], what: str, matters: bool) -> None:
    found = differences(**change)
    assert [(one.what, one.matters) for one in found] == [(what, matters)]
    assert found[0].why
    if matters:
        with pytest.raises(MisfitError, match="does not fit") as raised:
            require_fit("warm", found)
        assert raised.value.exit_code == 3
        assert raised.value.differences == [msgspec.to_builtins(one) for one in found]
    else:
        require_fit("warm", found)


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        ({"command": ["server", "--port", "8001"]}, "of this command"),
        ({"mountpoint": None}, "mount the weights there"),
        ({"kernel": "5.19"}, "on a machine like this one"),
    ],
)
def test_what_is_told_to_be_done_is_what_helps(change: dict[str, Any], mend: str) -> None:
    with pytest.raises(MisfitError) as raised:
        require_fit("warm", differences(**change))
    assert raised.value.mend is not None
    assert mend in raised.value.mend


def test_no_command_was_asked_for() -> None:
    assert differences(command=[]) == []


def test_gpus_do_not_matter_to_who_uses_none() -> None:
    found = differences(uses_gpu=False, gpus=[], driver=None)
    assert [(one.what, one.matters) for one in found] == [("GPU driver", False), ("GPUs", False)]


def test_each_gpu_needs_one_of_its_own() -> None:
    two = msgspec.structs.replace(FINGERPRINT, gpus=[HALF, H100])
    for here, fits in (([H100], False), ([H100, HALF], True), ([HALF, HALF], False), ([H100, H100, H200], True)):
        found = compare(two, msgspec.structs.replace(two, gpus=here), uses_gpu=True)
        assert all(not one.matters for one in found) is fits, here


def test_flags_that_only_the_kernel_uses_do_not_matter() -> None:
    was = msgspec.structs.replace(
        FINGERPRINT, cpu_features=["avx2", "hypervisor", "ibrs", "sse2", "tsc_deadline_timer"]
    )
    found = compare(was, msgspec.structs.replace(was, cpu_features=["sse2"]), uses_gpu=False)
    assert [(one.what, one.snapshot, one.matters) for one in found] == [
        ("CPU features", "avx2", True),
        ("CPU flags", "hypervisor ibrs tsc_deadline_timer", False),
    ]


def test_every_missing_feature_counts_where_flags_are_not_known() -> None:
    was = msgspec.structs.replace(FINGERPRINT, architecture="aarch64", cpu_features=["asimd", "sve"])
    found = compare(was, msgspec.structs.replace(was, cpu_features=["asimd"]), uses_gpu=False)
    assert [(one.snapshot, one.matters) for one in found] == [("sve", True)]


def test_several_differences_are_counted_in_the_one_line() -> None:
    found = differences(kernel="5.10", criu="3.0", cpu="other")
    with pytest.raises(MisfitError, match=r"kernel here: 5\.10, there: 6\.18\.5-amd64; .* \(and 1 more\)"):
        require_fit("warm", found)


def test_features_are_those_that_all_processors_have() -> None:
    text = "model name\t: A\nflags\t\t: b a c\n\nmodel name\t: B\nflags\t\t: c b\n"
    assert parse_cpuinfo(text) == ("A", ["b", "c"])
    assert parse_cpuinfo("Features : fp asimd\n") == ("", ["asimd", "fp"])
    assert parse_cpuinfo("") == ("", [])


def test_an_image_is_known_where_podman_tells(tmp_path: Path) -> None:
    assert image_of(str(tmp_path)) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".containerenv").write_text("")
    assert image_of(str(tmp_path)) is None
    (tmp_path / "run" / ".containerenv").write_text('engine="podman-4"\nimageid="abc"\nrootless=0\n')
    assert image_of(str(tmp_path)) == "abc"


def test_here_is_this_machine(tmp_path: Path) -> None:
    found = Fingerprint.here(criu="4.1.1", gpus=[H100], mountpoint="/m", command=("a",), root=str(tmp_path))
    assert (found.kernel, found.architecture) == (os.uname().release, os.uname().machine)
    assert found.cpu_features
    assert found.image is None
    assert compare(found, found, uses_gpu=True) == []
