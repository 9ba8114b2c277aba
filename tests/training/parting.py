"""A process that trains beside others and notes its threads before and after it parts from them: `parting.py <folder>`."""

import json
import sys
from pathlib import Path

import several

from score_sde import distributed


def threads() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    distributed.start()
    rank = distributed.rank()
    several.train(folder / "run", steps=2)
    several.sample()
    during = threads()
    distributed._end()
    (folder / f"threads-{rank}").write_text(json.dumps([during, threads()]))
