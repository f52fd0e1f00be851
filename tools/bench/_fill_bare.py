"""Reads the weights of a bare folder into the page cache by prefetch's own plan and filler, without a mount.

    python _fill_bare.py FOLDER

One JSON line on stdout once all is there: {"bytes": of all, "seconds": of reading, "start_s": of Python before}.
"""

import time

STARTED = time.time()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from prefetch.course import Course  # noqa: E402
from prefetch.filler import Fill, Filler, FillerConfig  # noqa: E402
from prefetch.plan import plan_of  # noqa: E402
from weightfs.model import open_model  # noqa: E402


def main() -> None:
    folder = sys.argv[1]
    layout = open_model(folder)
    fds = {file: os.open(os.path.join(folder, file), os.O_RDONLY) for file in layout.files}
    plan = plan_of(layout, {file: os.fstat(fd).st_size for file, fd in fds.items()})
    filler = Filler(FillerConfig())
    began = time.time()
    fill = Fill(Course(plan.extents()), fds, lambda: None, awaited=True)
    filler.start(fill)
    fill.ended.wait()
    if fill.failure:
        raise SystemExit(fill.failure)
    print(json.dumps({"bytes": plan.nbytes, "seconds": time.time() - began, "start_s": began - STARTED}))


main()
