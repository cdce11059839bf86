"""Python in processes of its own."""

import os
import subprocess
import sys


def python(*args, **options):
    """Python in a process of its own, with this one's path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)
