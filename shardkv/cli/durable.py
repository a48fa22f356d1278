"""Small files that one command leaves for a later one: how far it came, where its nodes are.

The rule: after a power cut there is the file as it was or as it is, whole; and once a call has returned, as it is.
"""

import contextlib
import os
from pathlib import Path


def replace_durably(path: Path, content: str) -> None:
    """Raises OSError; then the file is as it was."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    # Some file systems know no sync of a directory, and nothing else is to be had there.
    with contextlib.suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
