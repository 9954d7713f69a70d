"""Errors that end a command early, and their messages."""

import errno
import re
from collections.abc import Sequence

# torch says it in a type of its own on GPUs, and in a RuntimeError on CPUs.
_NO_MEMORY = re.compile("^OutOfMemoryError|DefaultCPUAllocator: (can't|not enough)")


class UserError(ValueError):
    """Bad input. The message says what was received, what was expected and what to do."""


_MOST_NAMED = 10


def raise_together(errors: Sequence[UserError], problems: str) -> None:
    """Raise several errors as one with a line for each, so that they can be corrected at once; none if there are none.

    Args:
        errors: the errors; the first 10 are quoted.
        problems: what they are, in the plural.

    Raises:
        UserError: there is an error; a single one is raised as it is.
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        rest = [f"and {len(errors) - _MOST_NAMED} more"] if len(errors) > _MOST_NAMED else []
        raise UserError("\n  ".join([f"{len(errors)} {problems}:", *map(str, errors[:_MOST_NAMED]), *rest]))


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C, raised once the state is saved; the exit code is 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def message(error: Exception) -> str | None:
    """Return the message for a user; None if only a traceback helps.

    Besides :class:`UserError`, users can fix a file that the system refuses, a full disk and a lack of memory.
    """
    if isinstance(error, MemoryError) or _NO_MEMORY.search(f"{type(error).__name__}: {error}"):
        said = ". ".join(str(error).split(". ")[:2])
        return (
            f"out of memory{said and f' ({said})'}. Training takes less with train.accumulate=2 or more (the batch in "
            "parts), a smaller train.batch_size or data.crop; evaluation with a smaller eval.batch_size; predict with "
            "--batch-size 1. What a run has saved is kept"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return str(error) if full or isinstance(error, UserError) else None
