"""What ends a command early."""


class UserError(ValueError):
    """Bad input. The message says what was received, what was expected and what to do."""


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C; what is worth keeping has been saved. The exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
