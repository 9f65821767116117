"""The errors a user can cause or meet. Each carries the exit code its end deserves.

Anything else that is raised is a bug and keeps its traceback.
"""

STOPPED = 75
"""Exit code of a run that was stopped, with a checkpoint: run it again."""


class JobError(Exception):
    """The world is not as it must be: files, network, lock, lost rank, non-finite loss."""

    exit_code = 1
    stop_reason = "error"

    def __init__(self, message: str, *, local: bool = False, stop_reason: str | None = None) -> None:
        """`local`: the other ranks do not know of it, so this one must speak although it may not be rank 0."""
        super().__init__(message)
        self.local = local
        self.reported = False
        """The user has read it already."""
        if stop_reason is not None:
            self.stop_reason = stop_reason

    def add(self, advice: str) -> None:
        """Append what to do next, on a line of its own."""
        self.args = (f"{self}\n{advice}",)


class UsageError(JobError, ValueError):
    """Knowable from flags, recipe and saved config alone: the same command can never work."""

    exit_code = 2
