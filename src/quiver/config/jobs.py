"""Settings of work that outlasts a request."""

from dataclasses import dataclass

from quiver.config.setting import setting


@dataclass(frozen=True, slots=True)
class JobsConfig:
    """Jobs, batches, and the files that they are made of."""

    take_jobs: bool = setting(
        True,
        "Take jobs, batches and files; false: refuse them. Several servers on one address need PostgreSQL for them.",
    )
    job_lines: int = setting(
        128, "Most lines of batches and jobs at work at once: as many as keep the lanes busy; the rest wait on disk."
    )
    max_file_bytes: int = setting(
        200 << 20, "Largest file that may be uploaded, in bytes; a larger one is answered 413."
    )
    max_batch_lines: int = setting(50_000, "Most lines in the file of a batch.")
    file_days: float = setting(30.0, "How long files and batches are kept, in days, where a request does not say.")
    webhooks: bool = setting(
        False, "Call the `webhook` of a RunPod job when it has ended; off, a job that has one is refused."
    )
    webhooks_private: bool = setting(False, "Webhooks may be at private addresses, too.")
