"""Tests of birds in milliseconds: the same API in one process, without Ray, in virtual time.

    def test_counter(flock):  # the fixture is there as soon as flock_ray is installed
        flock.start("a", Counter)
        assert flock.call("a", "inc") == 1
        flock.crash("a")  # its process is killed
        assert flock.call("a", "inc") == 1  # it was restarted, with fresh state

Without pytest: `with flock_ray.testing.Flock() as flock: ...`.
"""

from flock_ray.testing.flock import Flock

__all__ = ["Flock"]
