"""The errors that a user can cause or meet, each with its exit code. Anything else that is raised is a bug."""

STOPPED = 75  # exit code of a job that stopped early with a checkpoint: start the job again


class JobError(Exception):
    """Operational failure: files, network, lock, lost rank, NaN."""

    exit_code = 1

    def __init__(self, message: str, *, local: bool = False, stop_reason: str = "error") -> None:
        """Take the message: the field or file, what was found, what was expected and what to type next.

        `local`: this rank prints the error, since the others do not know of it. `stop_reason`: that of summary.json.
        """
        super().__init__(message)
        self.local = local
        self.stop_reason = stop_reason
        self.reported = False


class UsageError(JobError, ValueError):
    """A mistake in the flags or in the script: the same command can never work."""

    exit_code = 2
