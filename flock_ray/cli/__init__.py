"""`flock-ray`, the command line. `commands.py` has the commands; nothing else of flock_ray imports from here."""
