"""`python -m flock_ray.cli`: the same as `flock-ray`."""

from flock_ray.cli.commands import main

main()
