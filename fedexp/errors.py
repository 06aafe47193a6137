"""The one exception that fedexp raises for bad input."""


class UserError(ValueError):
    """Bad input: the message names the culprit and the way out.

    `fedexp.main` prints it without a traceback and exits with code 2.
    """
