"""Small files that one command leaves for a later one: how far it came, where its nodes are.

The rule: after a power cut there is the file as it was or as it is, whole; and once a call has returned, as it is.
"""

import contextlib
import os
from pathlib import Path


def replace_durably(path: Path, content: str) -> None:
    """Raises OSError; then the file is as it was."""
    temporary = path.with_name(path.name + ".new")
    file = temporary.open("w")
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def remove_durably(path: Path) -> None:
    """No error if it is not there. Raises OSError; then the file is as it was."""
    path.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    # Some file systems know no sync of a directory, and nothing else is to be had there.
    with contextlib.suppress(OSError):
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
