"""The one exception type that means "the user can mend this"."""


class UserError(ValueError):
    """Bad input. The message says what was received, what was expected and what to do."""
