"""Pid 1 of a second instance: waits for every process there, passes on connections, ends with the restored process.

    python -I instance_program.py FD LISTENER:PORT...

FD is one end of a stream socket pair. It says `ready` there, and reads the pid of the restored process, as it is in
this pid namespace; when the other end is closed before, it ends, and the kernel ends whatever is in the namespace.
LISTENER is a listening socket of the network namespace outside: what connects there is connected to PORT in here.

Uses the standard library alone, and stays as small as Python is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
from typing import Final

_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
_CHUNK_BYTES: Final = 1 << 16


def main(arguments: list[str]) -> int:
    """Be pid 1; gives the exit status of the restored process, 128 and the signal's number where one has ended it."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _loopback_up()
    held = socket.socket(fileno=int(arguments[0]))
    for one in arguments[1:]:
        listener, port = map(int, one.split(":"))
        threading.Thread(target=_accept, args=(socket.socket(fileno=listener), port), daemon=True).start()
    held.sendall(b"ready\n")
    said = held.recv(32)
    held.close()
    if not said:
        return 1
    root = int(said)
    while True:
        pid, status = os.wait()
        if pid == root:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sh22x", b"lo", 0))
        flags = struct.unpack("16sh22x", request)[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


def _accept(listener: socket.socket, port: int) -> None:
    while True:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", port))
        except OSError:
            client.close()
            continue
        for one, other in ((client, server), (server, client)):
            threading.Thread(target=_copy, args=(one, other), daemon=True).start()


def _copy(one: socket.socket, other: socket.socket) -> None:
    """What comes from one goes to the other, up to its end; each is closed when both directions have come to theirs."""
    with contextlib.suppress(OSError):
        while chunk := one.recv(_CHUNK_BYTES):
            other.sendall(chunk)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
