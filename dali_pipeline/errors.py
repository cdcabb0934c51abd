"""What a user can mend, as an exception of its own."""

from __future__ import annotations


class UserError(Exception):
    """Something that a user can mend: the message says what and how, and a command ends with `exit_code`."""

    exit_code = 2
