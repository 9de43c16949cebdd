"""The errors of the pipeline.

    PipelineError
    ├── UsageError              a wrong argument or a wrong setting
    │   ├── SettingsError       a setting is missing or malformed
    │   └── AccessDenied        the service rejects the key or password, or the host does not exist
    ├── RefusedError            the request is valid, but not safe to carry out now
    ├── UnfinishedError         the batch is incomplete; the same command resumes it
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

    BadInput                    a file of the dataset is unusable; becomes a reject, never fails the run

Only a TransientError is retried. The table in `cli.py` maps errors to exit codes.
"""

from __future__ import annotations


class PipelineError(Exception):
    """The root of the errors that a user may see.

    Arguments:
        message: what happened, in one sentence, without secrets.
        hint: what to do, in one sentence; may be empty.

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
    """An argument or a setting is wrong; nothing was started."""


class SettingsError(UsageError):
    """A setting is missing or malformed; the message has its name, never its value."""


class AccessDenied(UsageError):
    """A service rejects the key or password, or its host name does not exist."""


class RefusedError(PipelineError):
    """The request is not safe to carry out; nothing was changed."""


class UnfinishedError(PipelineError):
    """The batch is incomplete; running the same command again resumes it."""


class Interrupted(PipelineError):
    """Ctrl-C or SIGTERM stopped the run."""


class TransientError(PipelineError):
    """The operation may succeed unchanged later."""


class DatabaseUnavailable(TransientError):
    """PostgreSQL is unreachable or restarting, or asks to retry the transaction."""


class SourceUnavailable(TransientError):
    """The dataset is missing, for example because its file system is not mounted."""


class StorageUnavailable(TransientError):
    """Storage is unreachable or responds with a server error; `code` is the error code of the response, if any."""

    code = ""


class StorageOverloaded(StorageUnavailable):
    """Storage responds with 429, 503 or 544: fewer concurrent requests are needed."""


class PermanentError(PipelineError):
    """The operation will not succeed unchanged."""


class DatabaseError(PermanentError):
    """PostgreSQL rejects a statement; `code` is the SQLSTATE, empty if there is none."""

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint)
        self.code = code

    def __reduce__(self) -> tuple[type[PipelineError], tuple[str, str]]:
        return (type(self), (self.message, self.hint, self.code))  # type: ignore[return-value]


class DataError(DatabaseError):
    """PostgreSQL refuses the rows themselves: SQLSTATE class 22 (data exception) or 23 (constraint violation)."""


class StorageError(PermanentError):
    """Storage rejects a request; `code` is the error code of the response."""

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint)
        self.code = code

    def __reduce__(self) -> tuple[type[PipelineError], tuple[str, str]]:
        return (type(self), (self.message, self.hint, self.code))  # type: ignore[return-value]


class ObjectNotFound(StorageError):
    """The object or bucket does not exist, or the key may not read it."""


class ObjectExists(StorageError):
    """The object or bucket already exists."""


class BadInput(Exception):
    """A file of the dataset is unusable; `code` is the reject code, `message` the reason in one sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
