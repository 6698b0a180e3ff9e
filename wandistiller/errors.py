"""The exception for mistakes that the person at the keyboard can put right, and the short form of other libraries' errors."""


class UserError(ValueError):
    """A mistake in flags, config or files, told in one message that a person can act on."""

    exit_code = 2


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message, since other libraries write whole paragraphs."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
