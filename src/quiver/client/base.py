"""What both clients are made of: where the server is, and what was used of it."""

from abc import ABC, abstractmethod

from quiver.client.core import Core, Verify, settings
from quiver.client.results import Used


class Client(ABC):
    """One server, and how it is called.

    `url` may be `unix:///PATH/rest.sock`; without one it is QUIVER_URL's or http://localhost:8000, as `api_key` is
    QUIVER_API_KEY's. `model` is asked for where a call names none. `timeout` is how many seconds a call may take in all,
    unless the call says otherwise; `max_retries` how often a request is sent again; `max_inputs` how many texts go into
    one request, and `max_concurrency` how many requests are at work at once. `verify` is for TLS, as httpx has it.
    Raises `ConfigError` or `MissingExtra`.
    """

    def __init__(  # noqa: PLR0913  each is a setting
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 4,
        max_inputs: int = 256,
        max_concurrency: int = 4,
        verify: Verify = True,
    ) -> None:
        self._core = Core(
            settings(
                url,
                api_key,
                model=model,
                timeout=timeout,
                max_retries=max_retries,
                max_inputs=max_inputs,
                max_concurrency=max_concurrency,
            )
        )
        self._start(self._core, verify)

    @abstractmethod
    def _start(self, core: Core, verify: Verify) -> None:
        """Make what runs plans."""

    @property
    def used(self) -> Used:
        """What this client has used of the server so far."""
        return self._core.used

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._core.settings})"
