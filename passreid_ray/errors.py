"""The one exception that is meant for people."""


class UserError(ValueError):
    """Something the user can mend: one line that says what, where, what was found and what to do.

    Jobs print it without a traceback and exit with status 1.
    """
