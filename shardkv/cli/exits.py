"""What an error means for the process: its exit code and the line on stderr.

The codes are part of the contract: 0 done, 1 the cluster answered with an error or the key is absent, 2 wrong usage,
3 the cluster could not be reached in time, 4 outcome unknown, 130 interrupted.
"""

from typing import Final

from shardkv import errors
from shardkv.program import DONE, FAILED, INTERRUPTED, USAGE, leaf

__all__ = ["DONE", "FAILED", "INTERRUPTED", "UNKNOWN", "UNREACHABLE", "USAGE", "code_of", "leaf", "message_of"]

UNREACHABLE: Final = 3
UNKNOWN: Final = 4

_USAGE_ERRORS: Final = (
    errors.ConfigError,
    errors.KeyTooLarge,
    errors.ValueTooLarge,
    errors.InvalidRange,
    errors.TransactionTooLarge,
)
"""Found before anything is sent: the arguments are wrong, whatever the cluster holds."""


def code_of(error: BaseException) -> int | None:
    """The exit code for an error, or None for one that is a bug and should show its traceback."""
    match leaf(error):
        case KeyboardInterrupt():
            return INTERRUPTED
        case errors.BatchError() as batch if batch.__cause__ is not None:
            return code_of(batch.__cause__) or FAILED
        case errors.OutcomeUnknown():
            return UNKNOWN
        case errors.Unavailable() | errors.ClientClosed():
            return UNREACHABLE
        case errors.ShardKVError() as known:
            return USAGE if isinstance(known, _USAGE_ERRORS) else FAILED
        case ConnectionError():
            return UNREACHABLE
        case OSError():
            return FAILED
    return None


def message_of(error: BaseException) -> str:
    """One line for stderr."""
    found = leaf(error)
    if isinstance(found, KeyboardInterrupt):
        return "interrupted"
    kind = type(found).__name__
    return f"Error: {found} ({kind})" if str(found) else f"Error: {kind}"
