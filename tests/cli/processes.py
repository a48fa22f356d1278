"""What tests that start processes share: the node's stand-in, and how long is waited."""

import sys
from pathlib import Path

STANDIN = [sys.executable, str(Path(__file__).with_name("standin.py")), "node"]
SECONDS = 180.0
"""What a process may take to start or to end, on however slow a machine."""
