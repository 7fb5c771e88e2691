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
Widen = Callable[[str, Dialect], Dialect]
"""(path, owner) -> the owner as it is to answer there, where clients of other APIs may call as well."""


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
        self._fixed: dict[str, dict[str, list[Claim]]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, list[Claim]]]] = []
        self._by_prefix = {dialect.name: dialect for dialect in dialects if dialect.has_prefix}
        _check_names(dialects, shared, preferred)
        templates: dict[str, dict[str, list[Claim]]] = {}
        for path, dialect, route in mounted(dialects):
            templates.setdefault(path, {}).setdefault(route.method, []).append((dialect, route))
        for template, methods in templates.items():
            self._check(template, methods)
            if "{" in template:
                self._patterns.append((_pattern(template), methods))
            else:
                self._fixed[template] = methods

    def _check(self, path: str, methods: Mapping[str, Sequence[Claim]]) -> None:
        for method, claims in methods.items():
            names = [dialect.name for dialect, _ in claims]
            told_apart = {choice.dialect for choice in self._shared.get((method, path), ())}
            if len(claims) > 1 and not told_apart.issuperset(names):
                raise ConfigError(
                    f"{' and '.join(names)} all claim {method} {path}, and nothing tells them apart: a bug"
                )

    def owner(self, path: str) -> Dialect:
        """Return the dialect under whose prefix a path lies, whether or not there is something; else the first one."""
        return self._by_prefix.get(path.split("/", 2)[1] if "/" in path else "", self._fallback)

    def find(self, call: Call) -> tuple[Dialect, Route, Mapping[str, str]]:
        """Return the route and what its template matched. Raises `UnknownRoute` or `WrongMethod`."""
        methods, params = self._match(call.path)
        method = "GET" if call.method == "HEAD" else call.method
        if method not in methods:
            allowed = tuple(sorted(methods))
            raise WrongMethod(f"{call.path} does not take {method}, only {' and '.join(allowed)}", allowed=allowed)
        claims = methods[method]
        if len(claims) == 1:
            return *claims[0], params
        dialect, route = self._choose(claims, call, method)
        return self._widen(route.path, dialect), route, params

    def peek(self, method: str, path: str) -> tuple[Dialect, Route | None]:
        """Return whose a path is, as far as a call shows before its body is read, and the route."""
        try:
            methods, _ = self._match(path)
        except UnknownRoute:
            methods = {}
        claims = methods.get(method)
        if not claims:
            return self.owner(path), None
        if len(claims) == 1:
            return claims[0]
        dialect, route = self._preferred_of(claims, self._shared[method, claims[0][1].path])
        return self._widen(route.path, dialect), route

    def _choose(self, claims: Sequence[Claim], call: Call, method: str) -> Claim:
        """Tell by the call itself whose it is; where that says nothing, by preference."""
        by_name = {dialect.name: (dialect, route) for dialect, route in claims}
        choices = [c for c in self._shared[method, claims[0][1].path] if c.dialect in by_name]
        keys = _keys(call)
        for choice in choices:
            if choice.when and choice.when(call, keys):
                return by_name[choice.dialect]
        return self._preferred_of(claims, choices)

    def _preferred_of(self, claims: Sequence[Claim], choices: Sequence[Choice]) -> Claim:
        by_name = {dialect.name: (dialect, route) for dialect, route in claims}
        choices = [choice for choice in choices if choice.dialect in by_name]
        open_to_all = [choice.dialect for choice in choices if choice.when is None] or [choices[-1].dialect]
        name = next((name for name in self._preferred if name in open_to_all), open_to_all[0])
        return by_name[name]

    def _match(self, path: str) -> tuple[Mapping[str, list[Claim]], Mapping[str, str]]:
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
