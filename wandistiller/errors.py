"""The one exception that means the person at the keyboard can put it right."""


class UserError(ValueError):
    """A mistake in flags, config or files: one message a person can act on."""

    exit_code = 2
