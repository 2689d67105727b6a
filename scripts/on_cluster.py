"""The demo on a Ray cluster that runs, as a script for `ray submit` and `ray job submit`."""

from __future__ import annotations

import argparse
import sys

from flock_ray.cli.demo import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="auto", help="of the cluster")
    parser.add_argument("--nodes", type=int, default=4, help="to wait for")
    parser.add_argument("--birds", type=int, default=20, help="to start, at least 2")
    parser.add_argument("--light", action="store_true", help="light birds")
    given = parser.parse_args()
    return run(given.nodes, given.birds, given.light, given.address)


if __name__ == "__main__":
    sys.exit(main())
