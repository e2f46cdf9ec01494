"""The error that stands for a user's mistake."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line that names what is wrong and what to do about it.
    `launch.py` prints it without a traceback and exits with code 2.
    """
