"""The errors of this package, in one tree.

EmbeddedError
├── SetupError              the folder, the user, the installation or the arguments do not allow the operation
├── ServiceUnavailable      a service does not respond in time; a retry may succeed
└── ServiceFailed           a service does not start, does not stop, or failed
"""

from __future__ import annotations


class EmbeddedError(Exception):
    """An error with a message and a hint.

    Arguments:
        message: what happened, without secrets.
        hint: what to do about it; may be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SetupError(EmbeddedError):
    """The folder, the user, the installation or the arguments do not allow the operation."""


class ServiceUnavailable(EmbeddedError):
    """A service does not respond in time."""


class ServiceFailed(EmbeddedError):
    """A service does not start, does not stop, or failed."""
