"""The errors of the pipeline.

    PipelineError
    ├── UsageError
    │   ├── SettingsError
    │   └── AccessDenied
    ├── RefusedError
    ├── HeldError
    ├── UnfinishedError
    │   └── ClaimedError
    ├── Interrupted
    ├── TransientError
    │   ├── DatabaseUnavailable
    │   ├── SourceUnavailable
    │   └── StorageUnavailable
    │       └── StorageOverloaded
    └── PermanentError
        ├── DatabaseError
        │   └── DataError
        └── StorageError
            ├── ObjectNotFound
            └── ObjectExists

    BadInput

Only a TransientError is retried. The table in `cli/output.py` maps errors to exit codes.
"""

from __future__ import annotations

import errno

_SPACE = "Free space for temporary files (TMPDIR), in /dev/shm and where logs are written."
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _SPACE),
    errno.EFBIG: "Raise the limit for the size of a file: `ulimit -f unlimited`.",
    errno.EMFILE: "Raise the limit for open files: `ulimit -n 4096`.",
    errno.ENFILE: "Raise the limit for open files of all processes: fs.file-max.",
}


def remedy_of(error: OSError) -> str:
    """Return what to do about an error of the operating system that its number explains, else nothing."""
    return _REMEDIES.get(error.errno or 0, "")


def printable(text: str) -> str:
    """Return the text with its control characters escaped, so that a file name cannot forge a line of output."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class PipelineError(Exception):
    """The root of the errors that a user may see: what happened, and what to do, each in one sentence without secrets.

    Control characters other than line feeds are escaped: names of files and texts of servers may have them.
    `code` is the SQLSTATE, the error code in a response of Storage, or of an unfinished batch the class of the first
    failure; empty if there is none.
    """

    is_recorded = False  # as the failure of a task

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        self.message, self.hint = ("\n".join(map(printable, text.split("\n"))) for text in (message, hint))
        super().__init__(self.message)
        self.code = code


class UsageError(PipelineError):
    """An argument or a setting is wrong; nothing was started."""


class SettingsError(UsageError):
    """A setting is missing or malformed; the message has its name, never its value."""


class AccessDenied(UsageError):
    """A service rejects the key or password, or its host name does not exist."""


class RefusedError(PipelineError):
    """The request is not safe to carry out; nothing was changed."""


class HeldError(PipelineError):
    """The batch is complete but not published: a person has to release or reset it; the message has the reason."""


class UnfinishedError(PipelineError):
    """The batch is incomplete; running the same command again resumes it."""


class ClaimedError(UnfinishedError):
    """All that is new belongs to other unfinished batches; nothing was recorded."""


class Interrupted(PipelineError):
    """Ctrl-C or SIGTERM stopped the run."""


class TransientError(PipelineError):
    """The operation may succeed unchanged later."""


class DatabaseUnavailable(TransientError):
    """PostgreSQL is unreachable or restarting, or asks to retry the transaction."""


class SourceUnavailable(TransientError):
    """The dataset is missing, for example because its file system is not mounted."""


class StorageUnavailable(TransientError):
    """Storage is unreachable or responds with a server error; `retry_after` is in seconds, 0 without the header."""

    retry_after = 0.0
    is_retried = True  # False if only a person can change it


class StorageOverloaded(StorageUnavailable):
    """Storage responds with 429, 503 or 544: fewer concurrent requests are needed."""


class PermanentError(PipelineError):
    """The operation will not succeed unchanged."""


class DatabaseError(PermanentError):
    """PostgreSQL rejects a statement."""


class DataError(DatabaseError):
    """PostgreSQL refuses the rows themselves: SQLSTATE class 22 (data exception) or 23 (constraint violation)."""


class StorageError(PermanentError):
    """Storage rejects a request."""


class ObjectNotFound(StorageError):
    """The object or bucket does not exist, or the key may not read it."""


class ObjectExists(StorageError):
    """The object or bucket already exists."""


class BadInput(Exception):
    """A file of the dataset is unusable and becomes a reject; it has the code and the reason in one sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def unexpected(exception: BaseException) -> PermanentError:
    """Return the error that an alarm tells of an exception of any other class."""
    name = type(exception).__name__
    return PermanentError(f"{name}: {exception}", code=name)
