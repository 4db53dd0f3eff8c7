"""The one exception that means "the input is at fault, not the program"."""


class UserError(Exception):
    """Bad recipe, data, checkpoint or environment.

    The command line prints the message (one line per fault: file, key, fix) and exits with code 2
    without a traceback. Raise it before anything is written.
    """
