"""Python in a process of its own."""

import os
import subprocess
import sys


def in_subprocess(code: str, *arguments: str) -> str:
    """What the code prints. It must end well."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=180, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
