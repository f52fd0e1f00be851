"""What the supervisor starts to serve: its end of the link is the only argument, settings and orders come over it."""

from __future__ import annotations

import faulthandler
import logging
import signal
import socket
import sys
from typing import Any

from weightfs import linux
from weightfs.config import MountConfig
from weightfs.control import error_document
from weightfs.errors import WeightfsError
from weightfs.link import Link
from weightfs.logs import log_to
from weightfs.service import Descriptors, serve


def main() -> None:
    """Serve; an error is told to the supervisor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)
    link = Link(end)
    order = _first_words(link)["start"]
    settings = MountConfig(**order["settings"])
    try:
        log_to(order["log_file"], settings.log_level)
    except OSError:  # the folder is gone, or full: what the supervisor has for stderr may still do
        log_to(None, settings.log_level)
    try:
        descriptors = Descriptors(*(order[f"{name}_fd"] for name in Descriptors._fields))
        serve(settings, descriptors, link)
    except WeightfsError as e:
        logging.getLogger("weightfs").error("%s", e)
        link.say({"error": error_document(e)})
        sys.exit(e.exit_code)


def _first_words(link: Link) -> dict[str, Any]:
    linux.is_readable(link)
    message = link.receive()
    if message is None or message.words is None:
        sys.exit("the supervisor has gone")
    return message.words


if __name__ == "__main__":
    main()
