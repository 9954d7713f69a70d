"""What ends a command early."""

import errno


class UserError(ValueError):
    """Bad input. The message says what was received, what was expected and what to do."""


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C; what is worth keeping has been saved. The exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def message(error: Exception) -> str | None:
    """What a user is told of an error; None where only a traceback helps.

    Beside :class:`UserError`, a file that the system refuses, and a full disk, are a user's to mend.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return str(error) if full or isinstance(error, UserError) else None
