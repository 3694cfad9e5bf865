"""Which spans may be replaced, by patterns of module names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from spansearch.errors import SpanError

SHOWN = 6  # names of modules in a message


@dataclass(frozen=True)
class Within:
    """Patterns of module paths: ``*`` stands for anything, dots as well; what matches counts with all inside.

    Attributes:
        include: what is replaced must lie in modules that match one of these; none: anywhere.
        exclude: nothing that matches one of these is replaced, nor anything that holds it.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def allows(self, outermost: Iterable[str], inside: Iterable[str] = ()) -> bool:
        """May modules go?

        Args:
            outermost: paths of those that are replaced.
            inside: paths of the modules in them that go as well.
        """
        outermost = list(outermost)
        if self.include and not all(_lies_in(path, self.include) for path in outermost):
            return False
        return not any(_lies_in(path, self.exclude) for path in (*outermost, *inside))

    def require_matches(self, paths: Collection[str]) -> None:
        """Raise SpanError where a pattern matches no module: it was mistyped.

        Args:
            paths: of the modules that a model calls; what holds them, as a ModuleList does, counts as well.
        """
        paths = {name for path in paths for name in _upwards(path)}
        for kind, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(path, pattern) for path in paths):
                    known = ", ".join(sorted(paths, key=lambda path: (path.count("."), path))[:SHOWN])
                    raise SpanError(
                        f"{kind} {pattern!r} matches no module of the model. Modules are called as in "
                        f"named_modules(): {known}, ...; `*` stands for anything."
                    )


def _lies_in(path: str, patterns: Sequence[str]) -> bool:
    """Does a module or one that holds it match?"""
    return any(fnmatchcase(name, pattern) for name in _upwards(path) for pattern in patterns)


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
