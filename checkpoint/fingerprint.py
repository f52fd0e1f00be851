"""What a snapshot needs of a machine, and whether another machine has it.

A process takes with it what it found out about its machine when it started: it chose code for the processor's
features, mapped the driver's libraries by path, asked for GPUs. Nothing tells it that it wakes up elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from checkpoint.errors import MisfitError

_CPUINFO: Final = "proc/cpuinfo"
_CONTAINERENV: Final = "run/.containerenv"
_MENDS: Final = {"command": "make a snapshot of this command", "mountpoint": "mount the weights there"}

# Flags of x86 that a program's instructions depend on, or what the kernel saves of its registers. The others tell how
# the kernel uses the processor: virtualisation, power, flaws (arch/x86/include/asm/cpufeatures.h of Linux 6.18).
_X86_USED: Final = re.compile(
    r"fpu|tsc|cx8|cx16|cmov|mmx|mmxext|fxsr|fxsr_opt|clflush|clflushopt|clwb|pni|s?sse.*|3dnow.*|misalignsse|syscall|lm"
    r"|lahf_lm|movbe|popcnt|abm|bmi[12]|adx|tbm|xop|fma4?|f16c|avx.*|amx.*|aes|vaes|pclmulqdq|vpclmulqdq|gfni|sha_ni"
    r"|sha512|sm[34]|rdrand|rdseed|rdtscp|rdpid|fsgsbase|xsave|xsaveopt|xsavec|xgetbv1|erms|fsrm|fzrm|fsrs|fsrc|hle|rtm"
    r"|pku|ospke|movdiri|movdir64b|enqcmd|serialize|waitpkg|cldemote|user_shstk|cmpccxadd|raoint|prefetchiti|uintr|clzero"
    r"|monitorx|mwaitx|apx"
)


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GPU as a snapshot needs it.

    Attributes:
        model: as the driver names it, such as `NVIDIA H100 80GB HBM3`.
        memory_bytes: all of it, free or not.
    """

    model: str
    memory_bytes: int


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine and the surroundings of a process on it, as far as a restore depends on them.

    Attributes:
        architecture: as uname(2) says it, such as `x86_64`.
        page_bytes: of a page of memory.
        cpu: the processor's name; for people only.
        cpu_features: the flags that every processor has by /proc/cpuinfo, sorted.
        kernel: its release, such as `6.18.5-amd64`.
        criu: CRIU's version, such as `4.1.1`.
        driver: the NVIDIA driver's version, None where there is none.
        gpus: in the order in which the driver numbers them.
        image: the id of the container image the process runs from, None where none is known.
        mountpoint: where the weights are mounted, None where they lie on no weightfs mount.
        command: the command line of the root process; empty where none was asked for.
    """

    architecture: str
    page_bytes: int
    cpu: str
    cpu_features: list[str]
    kernel: str
    criu: str
    driver: str | None = None
    gpus: list[Gpu] = []
    image: str | None = None
    mountpoint: str | None = None
    command: list[str] = []

    @classmethod
    def here(
        cls,
        *,
        criu: str,
        driver: str | None = None,
        gpus: Iterable[Gpu] = (),
        mountpoint: str | None = None,
        command: Iterable[str] = (),
        root: str = "/",
    ) -> Fingerprint:
        """This machine's.

        Args:
            criu, driver, gpus, mountpoint, command: see the attributes.
            root: the process's root folder, such as `/proc/7/root`; the image it runs from is looked for there.

        Raises:
            OSError: /proc is not there.
        """
        with open(os.path.join("/", _CPUINFO), encoding="utf-8", errors="replace") as file:
            name, features = parse_cpuinfo(file.read())
        return cls(
            architecture=os.uname().machine,
            page_bytes=os.sysconf("SC_PAGE_SIZE"),
            cpu=name,
            cpu_features=features,
            kernel=os.uname().release,
            criu=criu,
            driver=driver,
            gpus=list(gpus),
            image=image_of(root),
            mountpoint=mountpoint,
            command=list(command),
        )


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not here as it was there.

    Attributes:
        what: such as `kernel`.
        snapshot: what it was there.
        here: what it is here.
        matters: whether the snapshot can't be restored for it.
        why: the reason it does, or does not.
    """

    what: str
    snapshot: str
    here: str
    matters: bool
    why: str


def parse_cpuinfo(text: str) -> tuple[str, list[str]]:
    """The processor's name, and the features that all processors have, from /proc/cpuinfo; empty where it says none."""
    name = ""
    features: set[str] | None = None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        match key.strip():
            case "flags" | "Features":
                found = set(value.split())
                features = found if features is None else features & found
            case "model name" | "Model" if not name:
                name = value.strip()
            case _:
                pass
    return name, sorted(features or ())


def image_of(root: str) -> str | None:
    """The id of the image of the container whose root folder this is, None where it is not to be found.

    Podman writes it to `/run/.containerenv` of privileged containers; Docker and Kubernetes tell nobody inside.
    """
    try:
        with open(os.path.join(root, _CONTAINERENV), encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 16)
    except OSError:
        return None
    found = re.search(r'^imageid="([^"]{1,200})"$', text, re.MULTILINE)
    return found[1] if found else None


def compare(snapshot: Fingerprint, here: Fingerprint, *, uses_gpu: bool) -> list[Difference]:
    """All that differs between the machine a snapshot was made on and another one. Pure.

    Args:
        snapshot: where it was made.
        here: where it would be restored. Its command counts only where there is one.
        uses_gpu: whether a process of the snapshot uses CUDA.
    """
    found = [
        _same("architecture", snapshot.architecture, here.architecture, "its code is another processor's"),
        _same(
            "page size", f"{snapshot.page_bytes}", f"{here.page_bytes}", "its memory is laid out in pages of that size"
        ),
        *_cpu(snapshot, here),
        _not_older("kernel", snapshot.kernel, here.kernel, 2, "the images may hold what an older kernel does not have"),
        _not_older("CRIU", snapshot.criu, here.criu, 3, "an older CRIU may not know what is in the images"),
        *_gpus(snapshot, here, uses_gpu=uses_gpu),
        _same("container image", snapshot.image, here.image, "programs and libraries are opened again by their paths"),
        _same("mountpoint", snapshot.mountpoint, here.mountpoint, "weights are opened again by their paths"),
    ]
    if here.command:
        why = "the process restored would not be the one asked for"
        found.append(_same("command", _shown(snapshot.command), _shown(here.command), why))
    return [one for one in found if one is not None]


def misfit(differences: Sequence[Difference]) -> str | None:
    """In one line why a snapshot does not fit; None where it does."""
    if not (wrong := [one for one in differences if one.matters]):
        return None
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    first = wrong[0]
    return f"{first.what} here: {first.here}, there: {first.snapshot}; {first.why}{more}"


def require_fit(name: str, differences: Sequence[Difference]) -> None:
    """Refuse a snapshot that does not fit.

    Raises:
        MisfitError: a difference matters; it carries all of them.
    """
    if (reason := misfit(differences)) is None:
        return
    first = next(one.what for one in differences if one.matters)
    mend = _MENDS.get(first, "make a snapshot on a machine like this one")
    documents: list[dict[str, Any]] = [msgspec.to_builtins(one) for one in differences]
    raise MisfitError(
        f"snapshot {name} does not fit this machine: {reason}",
        mend=f"weightfs snapshot show {name} tells all; {mend}",
        differences=documents,
    )


def _same(what: str, snapshot: str | None, here: str | None, why: str) -> Difference | None:
    if snapshot == here:
        return None
    return Difference(what=what, snapshot=snapshot or "none", here=here or "none", matters=True, why=why)


def _cpu(snapshot: Fingerprint, here: Fingerprint) -> list[Difference]:
    if snapshot.architecture != here.architecture:
        return []  # their flags have nothing in common
    found = []
    if snapshot.cpu != here.cpu:
        found.append(_harmless("processor", snapshot.cpu, here.cpu, "what counts are its features"))
    missing = sorted(set(snapshot.cpu_features) - set(here.cpu_features))
    extra = sorted(set(here.cpu_features) - set(snapshot.cpu_features))
    used = [one for one in missing if here.architecture != "x86_64" or _X86_USED.fullmatch(one)]
    unused = [one for one in missing if one not in used]
    if used:
        why = "the process may have chosen code that uses them when it started"
        found.append(Difference(what="CPU features", snapshot=" ".join(used), here="missing", matters=True, why=why))
    if unused:
        found.append(_harmless("CPU flags", " ".join(unused), "missing", "only the kernel uses them"))
    if extra:
        found.append(_harmless("more CPU flags", "missing", " ".join(extra), "the process does not know of them"))
    return found


def _not_older(what: str, snapshot: str, here: str, parts: int, why: str) -> Difference | None:
    """Compare versions by their first numbers."""
    if snapshot == here:
        return None
    if _version(here, parts) < _version(snapshot, parts):
        return Difference(what=what, snapshot=snapshot, here=here, matters=True, why=why)
    return _harmless(what, snapshot, here, "it is not older")


def _version(text: str, parts: int) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d{1,9}", text, re.ASCII)[:parts])


def _gpus(snapshot: Fingerprint, here: Fingerprint, *, uses_gpu: bool) -> list[Difference]:
    found = [
        _same(
            "GPU driver", snapshot.driver, here.driver, "its libraries are mapped in the process, and opened by version"
        ),
        _gpu_difference(snapshot.gpus, here.gpus),
    ]
    present = [one for one in found if one is not None]
    if uses_gpu:
        return present
    why = "no process of the snapshot uses a GPU"
    return [_harmless(one.what, one.snapshot, one.here, why) for one in present]


def _gpu_difference(snapshot: Sequence[Gpu], here: Sequence[Gpu]) -> Difference | None:
    """Whether each GPU of the snapshot finds one of its own model, with as much memory, the largest first."""
    if list(snapshot) == list(here):
        return None
    shown = (_gpu_list(snapshot), _gpu_list(here))
    left = sorted(here, key=lambda gpu: gpu.memory_bytes)
    why = ""
    for wanted in sorted(snapshot, key=lambda gpu: -gpu.memory_bytes):
        alike = [gpu for gpu in left if gpu.model == wanted.model]
        if not alike:
            why = f"state of a GPU can be restored only to one of its own model, and each {wanted.model} needs one"
        elif alike[-1].memory_bytes < wanted.memory_bytes:
            why = "what was in GPU memory may not fit"
        else:
            left.remove(alike[-1])
            continue
        return Difference(what="GPUs", snapshot=shown[0], here=shown[1], matters=True, why=why)
    return _harmless("GPUs", *shown, "each that was used finds one of its own model")


def _gpu_list(gpus: Sequence[Gpu]) -> str:
    return ", ".join(f"{gpu.model} ({gpu.memory_bytes >> 20} MiB)" for gpu in gpus) or "none"


def _harmless(what: str, snapshot: str, here: str, why: str) -> Difference:
    return Difference(what=what, snapshot=snapshot or "none", here=here or "none", matters=False, why=why)


def _shown(command: Sequence[str]) -> str:
    return " ".join(command)
