"""What the sockets of a tree are and whom they talk to, each asked of the network namespace it is in.

TCP and UDP from /proc/PID/net (proc_pid_net(5)), which shows the namespace of that process; the peers of Unix sockets
from the kernel's sock_diag interface (sock_diag(7)), since /proc does not tell them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from checkpoint.processes import PROC, Process
from weightfs import linux

Family = Literal["tcp", "udp", "raw", "unix", "other"]

_TCP_STATES: Final = {1: "established", 7: "closed", 10: "listening"}
_LISTENING: Final = 10
_UNIX_STATES: Final = {1: "established", 7: "closed", 10: "listening"}
_UNIX_TYPES: Final = {1: "stream", 2: "dgram", 5: "seqpacket"}

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST_DUMP: Final = 0x1 | 0x300
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_UDIAG_SHOW_NAME_PEER: Final = 0x1 | 0x4
_UNIX_DIAG_NAME: Final = 0
_UNIX_DIAG_PEER: Final = 2
_HEADER: Final = struct.Struct("=IHHII")
_UNIX_MESSAGE: Final = struct.Struct("=BBBxIII")
_ATTRIBUTE: Final = struct.Struct("=HH")


@dataclass(frozen=True, kw_only=True, slots=True)
class Socket:
    """A socket of a process.

    Attributes:
        inode: as in `socket:[INODE]`.
        family: what it is; `other` is every one that CRIU may or may not know, see `protocol`.
        protocol: the kernel's name: `TCP`, `UDPv6`, `UNIX-STREAM`, `NETLINK`, `AF_VSOCK`.
        type: of a Unix socket `stream`, `dgram` or `seqpacket`; else empty.
        state: `listening`, `established` (whatever is between the first and the last packet), `closed`.
        local, remote: `127.0.0.1:80`, `[::1]:80`; of a Unix socket its path (`@name`
            where abstract) and that of the other end, empty where it has none.
        peer: the inode of the other end of a Unix socket, 0 without one or where it is not known.
        pending: of a listening TCP socket: connections that were not accepted yet.
    """

    inode: int
    family: Family
    protocol: str = ""
    type: str = ""
    state: str = "closed"
    local: str = ""
    remote: str = ""
    peer: int = 0
    pending: int = 0


def sockets_of(processes: Sequence[Process], *, proc: str = PROC) -> dict[int, Socket]:
    """The sockets that the processes of a tree have open, by inode.

    One that is closed meanwhile is left out.
    """
    found: dict[int, Socket] = {}
    tables: dict[int, dict[int, Socket]] = {}
    for process in processes:
        for descriptor in process.descriptors:
            inode = descriptor.inode
            if descriptor.kind != "socket" or inode in found:
                continue
            namespace = process.namespaces.get("net", 0)
            if namespace not in tables:
                tables[namespace] = _namespace(process.pid, proc)
            known = tables[namespace].get(inode)
            protocol = _protocol(f"{proc}/{process.pid}/fd/{descriptor.fd}")
            if known is None:
                known = Socket(inode=inode, family=_family(protocol))
            found[inode] = replace(known, protocol=protocol)
    return found


def _protocol(link: str) -> str:
    """What the kernel calls the protocol of an open socket."""
    try:
        return os.getxattr(link, "system.sockprotoname").rstrip(b"\0").decode(errors="replace")
    except OSError:  # closed meanwhile, or not a real /proc
        return ""


def _family(protocol: str) -> Family:
    for family in ("tcp", "udp", "raw", "unix"):
        if protocol.lower().startswith(family):
            return family
    return "other"


def _namespace(pid: int, proc: str) -> dict[int, Socket]:
    """Every socket of the network namespace of a process that its tables tell of."""
    found: dict[int, Socket] = {}
    for table, family in _TABLES:
        try:
            with open(f"{proc}/{pid}/net/{table}") as file:
                found.update((one.inode, one) for one in parse_inet(file.read(), family))
        except FileNotFoundError:  # no IPv6
            continue
    with contextlib.suppress(OSError):
        ends = {one.inode: one for one in _unix(pid, proc)}
        for one in ends.values():
            peer = ends.get(one.peer)
            found[one.inode] = replace(one, remote=peer.local) if peer else one
    return found


_TABLES: Final[tuple[tuple[str, Family], ...]] = (
    ("tcp", "tcp"),
    ("tcp6", "tcp"),
    ("udp", "udp"),
    ("udp6", "udp"),
    ("raw", "raw"),
    ("raw6", "raw"),
)


def parse_inet(table: str, family: Family) -> Iterator[Socket]:
    """The sockets in the text of /proc/net/tcp, udp and their like.

    A connection that waits to be accepted has no inode yet: it counts at the socket that listens.
    """
    rows = [line.split() for line in table.splitlines()[1:]]
    waiting = [row[1] for row in rows if row[9] == "0" and int(row[3], 16) == 1]
    for row in rows:
        inode, state = int(row[9]), int(row[3], 16)
        if not inode:
            continue
        pending = 0
        if family == "tcp" and state == _LISTENING:
            address, port = row[1].split(":")
            pending = sum(1 for one in waiting if one.endswith(f":{port}") and (not int(address, 16) or one == row[1]))
        yield Socket(
            inode=inode,
            family=family,
            state=_TCP_STATES.get(state, "established"),
            local=_address(row[1]),
            remote=_address(row[2]),
            pending=pending,
        )


def _address(text: str) -> str:
    """`0100007F:0050` is 127.0.0.1:80: each 32 bits of the address in the order of this machine."""
    address, port = text.split(":")
    raw = bytes.fromhex(address)
    words = struct.unpack(f">{len(raw) // 4}I", raw)
    ip = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped  # so that both ends of a connection are written alike
    return f"[{ip}]:{int(port, 16)}" if ip.version == 6 else f"{ip}:{int(port, 16)}"


def _unix(pid: int, proc: str) -> list[Socket]:
    """Every Unix socket of the network namespace of a process.

    Raises:
        OSError: the kernel does not answer, or its namespace may not be entered.
    """
    own = os.stat("/proc/self/ns/net").st_ino
    if not os.path.exists(f"{proc}/{pid}/ns/net") or os.stat(f"{proc}/{pid}/ns/net").st_ino == own:
        return _ask_unix()
    outcome: list[list[Socket] | OSError] = []

    def ask() -> None:
        # A thread of its own: it ends in that namespace, and this process stays where it is.
        try:
            with open(f"{proc}/{pid}/ns/net", "rb") as there:
                linux.enter_network(there.fileno())
            outcome.append(_ask_unix())
        except OSError as e:
            outcome.append(e)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    result = outcome[0]
    if isinstance(result, OSError):
        raise result
    return result


def _ask_unix() -> list[Socket]:
    """Have the kernel list the Unix sockets of this thread's network namespace."""
    request = struct.pack("=BBHIII8x", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW_NAME_PEER)
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    found: list[Socket] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as diag:
        diag.send(header + request)
        while True:
            answer = diag.recv(1 << 16)
            for kind, body in _messages(answer):
                if kind == _NLMSG_DONE:
                    return found
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    raise OSError(number, os.strerror(number))
                found.append(parse_unix(body))


def _messages(answer: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(answer):
        length, kind, _, _, _ = _HEADER.unpack_from(answer, offset)
        yield kind, answer[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def parse_unix(body: bytes) -> Socket:
    """The socket in a `struct unix_diag_msg` and the attributes behind it (`linux/unix_diag.h`)."""
    _, type_, state, inode, _, _ = _UNIX_MESSAGE.unpack_from(body)
    name, peer = "", 0
    offset = _UNIX_MESSAGE.size
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        value = body[offset + _ATTRIBUTE.size : offset + length]
        if kind == _UNIX_DIAG_NAME:
            name = os.fsdecode(b"@" + value[1:] if value[:1] == b"\0" else value.rstrip(b"\0"))
        elif kind == _UNIX_DIAG_PEER:
            peer = struct.unpack("=I", value)[0]
        offset += max(_ATTRIBUTE.size, (length + 3) & ~3)
    return Socket(
        inode=inode,
        family="unix",
        type=_UNIX_TYPES.get(type_, ""),
        state=_UNIX_STATES.get(state, "closed"),
        local=name,
        peer=peer,
    )


def outside_peers(processes: Sequence[Process], sockets: Mapping[int, Socket]) -> list[Socket]:
    """The connected sockets of a tree whose other end is not in it."""
    inside = {one.inode for process in processes for one in process.descriptors if one.kind == "socket"}
    ends = {(one.local, one.remote) for one in sockets.values() if one.family == "tcp"}
    return [
        one
        for one in sockets.values()
        if (one.family == "tcp" and one.state == "established" and (one.remote, one.local) not in ends)
        or (one.family == "unix" and one.peer and one.peer not in inside)
    ]
