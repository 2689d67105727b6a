"""`python -m flock_ray.runtime.boot GCS_ADDRESS FLOCK NODE`: starts a nest from a driver whose runtime_env is bare, and ends."""

from __future__ import annotations

import logging
import sys

import ray

from flock_ray.runtime import cluster


def main(address: str, flock: str, node: str) -> None:
    ray.init(address, namespace=cluster.NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    record = cluster.flock_life(flock)
    if record is None or record.ending:
        raise SystemExit(f"flock {flock!r} is gone")
    ray.get(cluster.start_nest(record, node).pid.remote())
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
