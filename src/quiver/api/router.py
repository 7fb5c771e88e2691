"""Which route a call belongs to. Several APIs live at one server: each whole under its own prefix, and all at the root.

At the root some paths belong to several APIs at once; how their calls are told apart is a table of `Choice`s
(`api/root.py`), and two claims to one path without a rule are an error when the server starts.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from quiver.api.call import Call, Dialect, Route
from quiver.errors import ConfigError, UnknownRoute, WrongMethod

Keys = Mapping[str, msgspec.Raw]
"""The fields of a call's JSON body, each still as bytes; empty where the body is no object."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One claimant of a shared path, and what its calls look like; without that, any call may be meant for it."""

    dialect: str
    when: Callable[[Call, Keys], bool] | None = None


Shared = Mapping[tuple[str, str], Sequence[Choice]]
"""By method and path: the first choice that fits is taken; of those without a condition, the preferred one."""

Claim = tuple[Dialect, Route]
When = Callable[[Call, Keys], bool]
Widen = Callable[[str, Dialect], Dialect]
"""(path, owner) -> the owner as it is to answer there, where clients of other APIs may call as well."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Whose a method and path are: of the first whose condition a call fits, else of the preferred one."""

    preferred: Claim
    told_apart: Sequence[tuple[When, Claim]] = ()

    def of(self, call: Call) -> Claim:
        """Tell by the call itself."""
        if self.told_apart:
            keys = _keys(call)
            for when, claim in self.told_apart:
                if when(call, keys):
                    return claim
        return self.preferred


class Router:
    """Finds the route of a call: a dictionary for fixed paths, patterns for the others."""

    def __init__(
        self,
        dialects: Sequence[Dialect],
        shared: Shared,
        preferred: Sequence[str] = (),
        widen: Widen = lambda _, dialect: dialect,
    ) -> None:
        self._shared = shared
        self._widen = widen
        self._preferred = preferred
        self._fallback = dialects[0]
        self._fixed: dict[str, Mapping[str, Owners]] = {}
        self._patterns: list[tuple[re.Pattern[str], Mapping[str, Owners]]] = []
        self._by_prefix = {dialect.name: dialect for dialect in dialects if dialect.has_prefix}
        _check_names(dialects, shared, preferred)
        templates: dict[str, dict[str, list[Claim]]] = {}
        for path, dialect, route in mounted(dialects):
            templates.setdefault(path, {}).setdefault(route.method, []).append((dialect, route))
        for template, methods in templates.items():
            self._check(template, methods)
            owners = {method: self._owners(method, template, claims) for method, claims in methods.items()}
            if "{" in template:
                self._patterns.append((_pattern(template), owners))
            else:
                self._fixed[template] = owners
        self._only = {path: only for path, methods in templates.items() if (only := _only_claimant(methods))}

    def _check(self, path: str, methods: Mapping[str, Sequence[Claim]]) -> None:
        for method, claims in methods.items():
            names = [dialect.name for dialect, _ in claims]
            told_apart = {choice.dialect for choice in self._shared.get((method, path), ())}
            if len(claims) > 1 and not told_apart.issuperset(names):
                raise ConfigError(
                    f"{' and '.join(names)} all claim {method} {path}, and nothing tells them apart: a bug"
                )

    def owner(self, path: str) -> Dialect:
        """Return whose a path is, whatever the method: by its prefix, or as it is nobody else's; else the first one."""
        prefix = path.split("/", 2)[1] if "/" in path else ""
        return self._by_prefix.get(prefix) or self._only.get(path, self._fallback)

    def find(self, call: Call) -> tuple[Dialect, Route, Mapping[str, str]]:
        """Return the route and what its template matched. Raises `UnknownRoute` or `WrongMethod`."""
        methods, params = self._match(call.path)
        method = "GET" if call.method == "HEAD" else call.method
        if method not in methods:
            allowed = tuple(sorted(methods))
            raise WrongMethod(f"{call.path} does not take {method}, only {' and '.join(allowed)}", allowed=allowed)
        dialect, route = methods[method].of(call)
        return dialect, route, params

    def peek(self, method: str, path: str) -> tuple[Dialect, Route | None]:
        """Return whose a path is, as far as a call shows before its body is read, and the route."""
        try:
            methods, _ = self._match(path)
        except UnknownRoute:
            methods = {}
        owners = methods.get(method)
        return owners.preferred if owners else (self.owner(path), None)

    def _owners(self, method: str, path: str, claims: Sequence[Claim]) -> Owners:
        """Put the claims to a path in order; what several APIs share, all their clients must be able to read."""
        if len(claims) == 1:
            return Owners(claims[0])
        by_name = {dialect.name: (self._widen(path, dialect), route) for dialect, route in claims}
        choices = [choice for choice in self._shared[method, path] if choice.dialect in by_name]
        open_to_all = [choice.dialect for choice in choices if choice.when is None] or [choices[-1].dialect]
        name = next((name for name in self._preferred if name in open_to_all), open_to_all[0])
        return Owners(by_name[name], [(choice.when, by_name[choice.dialect]) for choice in choices if choice.when])

    def _match(self, path: str) -> tuple[Mapping[str, Owners], Mapping[str, str]]:
        if path.startswith("/v1/v1/"):  # a client that adds /v1 itself was given it in its base URL, too
            path = path.removeprefix("/v1")
        if methods := self._fixed.get(path) or (self._fixed.get(path.rstrip("/")) if path != "/" else None):
            return methods, {}
        for pattern, methods in self._patterns:
            if match := pattern.fullmatch(path):
                return methods, match.groupdict()
        raise UnknownRoute("nothing lives at this path; GET /openapi.json lists what does")


def mounted(dialects: Sequence[Dialect]) -> Iterator[tuple[str, Dialect, Route]]:
    """Yield every path template with the route behind it: at the root, and under the dialect's own prefix."""
    for dialect in dialects:
        for route in dialect.routes:
            if route.at_root:
                yield route.path, dialect, route
            if dialect.has_prefix:
                yield f"/{dialect.name}{route.path}".rstrip("/"), dialect, route


def _check_names(dialects: Sequence[Dialect], shared: Shared, preferred: Sequence[str]) -> None:
    known = {dialect.name for dialect in dialects}
    for name in preferred:
        if name not in known:
            raise ConfigError(f"root_dialects names {name!r}; there are: {', '.join(sorted(known))}")
    for (method, path), choices in shared.items():
        for choice in choices:
            if choice.dialect not in known:
                raise ConfigError(f"the rule for {method} {path} names {choice.dialect!r}, which is no dialect: a bug")


def _only_claimant(methods: Mapping[str, Sequence[Claim]]) -> Dialect | None:
    """Return the one dialect that all routes of a path belong to, if it is one."""
    dialects = {dialect.name: dialect for claims in methods.values() for dialect, _ in claims}
    return next(iter(dialects.values())) if len(dialects) == 1 else None


def _keys(call: Call) -> Keys:
    try:
        return msgspec.json.decode(call.body, type=dict[str, msgspec.Raw]) if call.body else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def _pattern(template: str) -> re.Pattern[str]:
    """`/v1/models/{id:path}` -> a pattern with the group `id`."""
    parts = re.split(r"\{(\w+)(:path)?\}", template)
    text = re.escape(parts[0])
    for name, kind, literal in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        text += f"(?P<{name}>{'.+' if kind else '[^/]+'})" + re.escape(literal)
    return re.compile(text)
