"""What `weightfs mount` starts in the background. Settings come as JSON on stdin, the outcome goes to a descriptor."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from weightfs.cli.mounting import serve_here
from weightfs.config import MountConfig
from weightfs.errors import WeightfsError


def main() -> None:
    """Serve; the first line on the given descriptor is the mount document, or an error."""
    outcome = int(sys.argv[1])
    os.set_inheritable(outcome, False)
    settings = MountConfig(**json.load(sys.stdin))

    def say(document: dict[str, Any]) -> None:
        os.write(outcome, json.dumps(document).encode() + b"\n")
        os.close(outcome)

    try:
        os.makedirs(settings.state_folder, mode=0o700, exist_ok=True)
        serve_here(settings, say, log_file=os.path.join(settings.state_folder, "weightfs.log"))
    except WeightfsError as e:
        logging.getLogger("weightfs").error("%s", e)
        error = {"code": e.code, "message": e.message, "path": e.path, "mend": e.mend, "exit_code": e.exit_code}
        say({"error": error})
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
