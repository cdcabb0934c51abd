"""The exception for mistakes and conditions that a user can correct."""

from __future__ import annotations


class UserError(Exception):
    """Something that a user can correct. The message says what and how; a command prints it and ends with `exit_code`."""

    exit_code = 2
