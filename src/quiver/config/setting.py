"""What a setting is made of: its default, its help, its other names; and text that must not be printed."""

import dataclasses
from typing import Any


class Secret(str):
    """A string that prints as `***`; `reveal` gives its text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'" if self else "''"

    def __str__(self) -> str:
        return "***" if self else ""

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def reveal(self) -> str:
        """Return the text itself."""
        return "".join(self)


def setting(default: Any, help_text: str, *, also: tuple[str, ...] = ()) -> Any:
    """Declare a field; `also` is what other systems call it, beside its own `QUIVER_…` and `--…`.

    NAME or --name   the same value
    NAME:ms          in milliseconds
    NAME=value       a switch that stands for a value
    NAME/name        a directory that has it below
    NAME+NAME        two lists, one put after the other
    """
    return dataclasses.field(default=default, metadata={"help": help_text, "also": also})
