"""Python in processes of its own."""

import os
import subprocess
import sys


def path_environment():
    """The environment in which Python finds what this process finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def python(*args, **options):
    """Python in a process of its own, with this one's path."""
    command = [sys.executable, *args]
    options.setdefault("env", path_environment())
    return subprocess.run(command, capture_output=True, text=True, **options)
