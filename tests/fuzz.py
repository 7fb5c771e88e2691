"""Every operation of the OpenAPI document, called with what it allows and with what it does not: `make test-fuzz`.

The document is the server's own, and so are the promises that are checked: no reply is a server's error, each has the
content type and the schema that the document gives it, a method that it does not name is refused, and none is waited for
in vain. Of schemathesis's other checks, these say nothing here:

- `negative_data_rejection`: clients send fields that an API does not know, and it ignores them, as the originals do.
- `positive_data_acceptance`: a schema cannot say that a model exists, or that a text is short enough for it.
- `ignored_auth`: this server asks for no key; tests/test_http.py holds what happens where one is set.
"""

import asyncio
import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import schemathesis
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events

from conftest import listening

CASES = 20_000
CHECKS = (
    "allow_header_conformance",
    "content_type_conformance",
    "not_a_server_error",
    "response_headers_conformance",
    "response_schema_conformance",
    "status_code_conformance",
    "unsupported_method",
)
SETTINGS: dict[str, Any] = {
    "seed": 1,
    "request-timeout": 10.0,
    "continue-on-failure": True,
    "suppress-health-check": ["all"],
    "generation": {"database": "none", "max-examples": 110, "no-shrink": True},
    "phases": {"examples": {"enabled": False}, "stateful": {"enabled": False}},
    "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
}
"""The phase `coverage` tries the bounds of each field, `fuzzing` what chance brings; both make right and wrong calls."""


@contextlib.contextmanager
def served() -> Iterator[str]:
    """Run a server with the hash model in a thread of its own; yields its URL."""
    loop, stopping = asyncio.new_event_loop(), asyncio.Event()
    url: list[str] = []
    up = threading.Event()

    async def serve() -> None:
        async with listening() as where:
            url.append(where)
            up.set()
            await stopping.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    up.wait()
    try:
        yield url[0]
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()
        loop.close()


class Tally:
    """How often each operation was called, and what was wrong."""

    def __init__(self) -> None:
        self.cases: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.faults: dict[tuple[str, str], str] = {}

    def count(self, event: events.EngineEvent) -> None:
        """Take in what the engine tells."""
        if isinstance(event, events.NonFatalError | events.FatalError):
            self.faults[getattr(event, "label", "the run"), str(event.info.title)] = event.info.format()
        if isinstance(event, events.ScenarioFinished):
            self._count_scenario(event)

    def _count_scenario(self, event: events.ScenarioFinished) -> None:
        recorder = event.recorder
        self.cases[event.label] += len(recorder.interactions)
        for call in recorder.interactions.values():
            self.statuses[call.response.status_code if call.response else 0] += 1
        for node in recorder.cases.values():
            self.modes[str(node.value.meta.generation.mode.value)] += 1
        for checks in recorder.checks.values():
            for check in checks:
                if check.status is not Status.SUCCESS and check.failure_info:
                    fault = check.failure_info
                    self.faults.setdefault((event.label, check.name), f"{fault.failure}\n    {fault.code_sample}")
                elif check.status is not Status.SUCCESS:
                    self.faults.setdefault((event.label, check.name), "the check itself failed")

    def report(self) -> None:
        """Print it all."""
        for label, count in sorted(self.cases.items()):
            print(f"{count:6}  {label}")  # noqa: T201
        for (label, check), text in sorted(self.faults.items()):
            print(f"\nFAULT {label}: {check}\n{text}")  # noqa: T201
        print(  # noqa: T201
            f"\n{self.cases.total()} cases of {len(self.cases)} operations "
            f"({dict(self.modes)}, statuses {dict(sorted(self.statuses.items()))}): {len(self.faults)} faults"
        )


def main() -> int:
    """Call everything, and return 1 where a promise was broken or too little was tried."""
    tally = Tally()
    with served() as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=SchemathesisConfig.from_dict(SETTINGS))
        for event in engine.from_schema(schema).execute():
            tally.count(event)
    tally.report()
    if tally.cases.total() < CASES:
        print(f"these are fewer than {CASES} cases: raise max-examples")  # noqa: T201
    return int(bool(tally.faults) or tally.cases.total() < CASES)


if __name__ == "__main__":
    sys.exit(main())
