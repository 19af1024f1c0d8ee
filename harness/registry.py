"""How methods are found: a decorator, an entry point, or `--plugin file.py`. One door for bundled and outside methods.

A method is a class with `name`, `version` and `Parameters` (a frozen dataclass whose defaults are the paper's).
Registering checks the class, refuses a name that is taken, and needs no list to be edited elsewhere::

    @register("defense")
    class MyDefense(Defense):
        name = "mine"
        version = 1
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.errors import UserMistake, did_you_mean, one_line

KINDS = {
    "defense": "defenses",
    "attack": "attacks",
    "metric": "metrics",
    "adaptation_hook": None,
    "sampling_hook": None,
}
"""What can be registered, and the package whose modules hold the bundled ones."""

_NAME = re.compile(r"^[a-z][a-z0-9_]{0,39}$")
_methods: dict[tuple[str, str], type] = {}
_plugin_digests: dict[str, str] = {}  # module name -> digest of its file
_is_loaded = False

MethodClass = TypeVar("MethodClass", bound=type)


def register(kind: str) -> Callable[[MethodClass], MethodClass]:
    """Return a class decorator that registers a method of `kind` under its `name`.

    Raises TypeError when the class lacks name, version or a Parameters dataclass; ValueError when the name is bad or
    another class has it.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")

    def decorate(cls: MethodClass) -> MethodClass:
        where = f"{cls.__module__}.{cls.__qualname__}"
        for attribute in ("name", "version", "Parameters"):
            if not hasattr(cls, attribute):
                raise TypeError(f"{where}: a {kind} needs the class attribute '{attribute}'")
        if not isinstance(cls.name, str) or not _NAME.match(cls.name):
            raise ValueError(f"{where}: name {cls.name!r} must be lower case letters, digits and '_'")
        if not is_dataclass(cls.Parameters):
            raise TypeError(f"{where}: Parameters must be a frozen dataclass")
        taken = _methods.get((kind, cls.name))
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{where}: the {kind} name '{cls.name}' is taken by {taken.__module__}")
        _methods[kind, cls.name] = cls
        return cls

    return decorate


def names(kind: str) -> list[str]:
    """Return the names of the registered methods of a kind, sorted."""
    load()
    return sorted(name for k, name in _methods if k == kind)


def get(kind: str, name: str) -> type:
    """Return a registered class. Raises UserMistake with the nearest name when there is none."""
    load()
    try:
        return _methods[kind, name]
    except KeyError:
        raise UserMistake(f"unknown {kind} '{one_line(name, 60)}'{did_you_mean(name, names(kind))}") from None


def component(cls: type) -> str:
    """Return the component string of a method for its identity: name, version and, for plug-ins, file digest."""
    digest = _plugin_digests.get(cls.__module__)
    return f"{cls.name}@{cls.version}" + (f"+{digest[:16]}" if digest else "")


def load() -> None:
    """Import the bundled methods and those of installed distributions, once."""
    global _is_loaded
    if _is_loaded:
        return
    _is_loaded = True
    for package_name in filter(None, KINDS.values()):
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{module.name}")
        for entry in importlib.metadata.entry_points(group=f"immunitybench.{package_name}"):
            try:
                entry.load()
            except Exception as error:
                raise UserMistake(
                    f"the entry point '{entry.name}' of group immunitybench.{package_name} ({entry.value}) cannot be "
                    f"loaded: {type(error).__name__}: {one_line(error)}; update or remove that distribution"
                ) from error


def load_plugins(paths: Sequence[str | Path]) -> None:
    """Import each `--plugin` file; its methods register themselves.

    Raises UserMistake for a file that is missing, is not Python, fails on import or registers nothing.
    """
    load()
    for given in paths:
        path = Path(given)
        if not path.is_file():
            raise UserMistake(f"--plugin {given}: no such file; give the path of a Python file")
        if path.suffix != ".py":
            raise UserMistake(f"--plugin {given}: not a Python file (.py)")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        module_name = f"immunitybench_plugin_{path.stem}_{digest[:12]}"
        if module_name in sys.modules:
            continue
        before = set(_methods)
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        _plugin_digests[module_name] = digest
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name], _plugin_digests[module_name]
            for added in set(_methods) - before:
                del _methods[added]
            line = getattr(error, "lineno", None) or _line_in(error, path)
            raise UserMistake(
                f"--plugin {given}{f':{line}' if line else ''}: {type(error).__name__}: {one_line(error)}"
            ) from error
        if set(_methods) == before:
            raise UserMistake(
                f"--plugin {given}: registers no method; decorate a class with @register('defense'), "
                "'attack' or 'metric'"
            )


def _line_in(error: BaseException, path: Path) -> int | None:
    """Return the last line of `path` in the traceback of `error`."""
    line = None
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def describe(cls: type) -> dict[str, Any]:
    """Return name, version, origin and first docstring line of a method, for `list`."""
    summary = (cls.__doc__ or "").strip().splitlines()
    return {
        "name": cls.name,
        "version": cls.version,
        "origin": "plug-in" if cls.__module__ in _plugin_digests else cls.__module__,
        "summary": summary[0] if summary else "",
    }
