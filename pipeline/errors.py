"""The errors of the pipeline, in one tree.

    PipelineError
    ├── UsageError              a wrong argument or a wrong setting
    │   ├── SettingsError       a setting is missing or malformed
    │   └── AccessDenied        a key or password that the service refuses, a host that does not exist
    ├── RefusedError            what was asked is clear, and not safe to do now
    ├── UnfinishedError         the batch is not done; the same command resumes it
    ├── Interrupted             Ctrl-C or SIGTERM
    ├── TransientError          may succeed unchanged later
    │   ├── DatabaseUnavailable
    │   ├── SourceUnavailable
    │   └── StorageUnavailable
    │       └── StorageOverloaded
    └── PermanentError          will not succeed unchanged
        ├── DatabaseError
        │   └── DataError       the rows themselves are refused
        └── StorageError
            ├── ObjectNotFound
            └── ObjectExists

    BadInput                    a file of the dataset is not usable; becomes a reject, never an error of the run

The split that matters for a retry is transient and permanent. Which exit code belongs to which error is told in
one place only, the table in `cli.py`.
"""

from __future__ import annotations


class PipelineError(Exception):
    """Say in one sentence what went wrong, and in another what to do about it.

    Arguments:
        message: what happened, one sentence, free of secrets.
        hint: what to do, one sentence; empty when there is nothing to advise.

    Attributes:
        is_recorded: it is on record as the failure of a task.
    """

    is_recorded = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[PipelineError], tuple[str, str]]:
        return (type(self), (self.message, self.hint))


class UsageError(PipelineError):
    """Tell of a wrong argument or setting; nothing was begun."""


class SettingsError(UsageError):
    """Tell of a setting that is missing or malformed, by its name and never by its value."""


class AccessDenied(UsageError):
    """Tell of a service that does not let us in, or a host name that does not exist."""


class RefusedError(PipelineError):
    """Tell of a request that is not safe to carry out; nothing was changed."""


class UnfinishedError(PipelineError):
    """Tell of a batch that is not done; running the same command again resumes it."""


class Interrupted(PipelineError):
    """Tell of a run that was stopped by Ctrl-C or SIGTERM."""


class TransientError(PipelineError):
    """May succeed unchanged later: worth a retry."""


class DatabaseUnavailable(TransientError):
    """PostgreSQL cannot be reached, is restarting, or asks to try the transaction again."""


class SourceUnavailable(TransientError):
    """The dataset is not where discovery found it, as when nothing is mounted there at the moment."""


class StorageUnavailable(TransientError):
    """Storage cannot be reached or answers with a server error; `code` is the error code of its answer, if any."""

    code = ""


class StorageOverloaded(StorageUnavailable):
    """Storage asks for fewer requests at once (429, 503 or 544)."""


class PermanentError(PipelineError):
    """Will not succeed unchanged: a retry would hide a defect."""


class DatabaseError(PermanentError):
    """PostgreSQL refuses a statement; `code` is its SQLSTATE, empty if there is none."""

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint)
        self.code = code

    def __reduce__(self) -> tuple[type[PipelineError], tuple[str, str]]:
        return (type(self), (self.message, self.hint, self.code))  # type: ignore[return-value]


class DataError(DatabaseError):
    """PostgreSQL refuses the rows themselves: SQLSTATE class 22 (data exception) or 23 (constraint violation)."""


class StorageError(PermanentError):
    """Storage refuses a request; `code` is the error code of its answer."""

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint)
        self.code = code

    def __reduce__(self) -> tuple[type[PipelineError], tuple[str, str]]:
        return (type(self), (self.message, self.hint, self.code))  # type: ignore[return-value]


class ObjectNotFound(StorageError):
    """There is no such object or bucket, or the key may not see it."""


class ObjectExists(StorageError):
    """There is such an object or bucket already."""


class BadInput(Exception):
    """Say by a reject code and a sentence why a file of the dataset is not usable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
