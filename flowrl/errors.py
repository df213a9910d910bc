"""Errors that are the user's to mend: the command line prints their text without a traceback and exits with 2."""

from __future__ import annotations


class UserError(Exception):
    """What went wrong, where, and what to do, in one message."""
