"""The errors of this package, in one tree.

EmbeddedError
├── SetupError              what was asked cannot be done on this machine, or with these arguments
├── ServiceUnavailable      a service does not answer in time; it may later
└── ServiceFailed           a service does not start, or did not do what it was told
"""

from __future__ import annotations


class EmbeddedError(Exception):
    """An error with a sentence of what happened, and one of what to do.

    Arguments:
        message: what happened, without secrets.
        hint: what to do about it, empty where there is nothing to advise.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SetupError(EmbeddedError):
    """The folder, the user or the installation is not fit for the services."""


class ServiceUnavailable(EmbeddedError):
    """A service does not answer in time."""


class ServiceFailed(EmbeddedError):
    """A service does not start, or failed."""
