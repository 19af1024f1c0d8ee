"""Find methods by a decorator, an entry point, or `--plugin file.py`; bundled and outside methods register alike.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from inspect import getattr_static
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from harness.core import code, paths
from harness.core.errors import UserMistake, did_you_mean, one_line
from harness.core.identity import digest_of_json

KINDS = {
    "defense": "harness.contracts.defense:Defense",
    "preparation": "harness.contracts.defense:Defense",
    "attack": "harness.contracts.attack:Attack",
    "metric": "harness.contracts.metric:Metric",
    "detector": "harness.contracts.detector:Detector",
    "task": "harness.contracts.task:Task",
    "stage": "harness.contracts.stage:StageKind",
    "adaptation_hook": "harness.contracts.hooks:AdaptationHook",
    "sampling_hook": "harness.contracts.hooks:SamplingHook",
    "diagnostic": "harness.contracts.diagnostic:Diagnostic",
}
"""Kinds of methods, and the base class of each."""
PACKAGES = ("harness.stages", "harness.tasks", "defenses", "attacks", "metrics")
"""Packages whose modules hold the bundled methods."""
GROUPS = ("tasks", "stages", "defenses", "attacks", "metrics")
"""Installed distributions use the entry points `immunitybench.<group>`."""
REQUIRED = {
    "defense": ("protect",),
    "preparation": ("protect",),
    "attack": ("adapt", "load", "unload"),
    "metric": ("about", "score"),
    "detector": ("passes", "score"),
    "task": ("plan",),
    "stage": ("do",),
    "diagnostic": ("of",),
}
"""Functions that a method must override, by kind."""
ONE_OF = {"adaptation_hook": ("rewrite", "weigh"), "sampling_hook": ("begin", "at_step", "at_prediction")}
"""Functions of which a method must override at least one."""
ATTRIBUTES = {"metric": ("name", "version", "direction", "unit", "range"), "task": ("name", "version", "Spec")}
"""Class attributes that a method must set, by kind; other kinds: name and version."""
DIRECTIONS = ("higher", "lower", "none")
READS = ("predictions", "images", "model")
"""What a detector may see."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_methods: dict[tuple[str, str], type] = {}
_plugins: dict[str, dict[str, str]] = {}  # module name of a plug-in -> digests of its code, by module; "": its file
_digests: dict[str, str] = {}  # module name of any method -> digest of its code
_is_loaded = False


class BadMethod(ValueError):
    """A class that cannot be registered; the message gives the reason in terms of the class."""


MethodClass = TypeVar("MethodClass", bound=type)


def register(kind: str) -> Callable[[MethodClass], MethodClass]:
    """Return a class decorator that registers a method of `kind` under its `name`.

    Raises BadMethod when the class lacks what the kind needs, its name is invalid, or another class has the name.
    """
    if kind not in KINDS:
        raise BadMethod(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")

    def decorate(cls: MethodClass) -> MethodClass:
        module_name, _, base_name = KINDS[kind].partition(":")
        base = getattr(importlib.import_module(module_name), base_name)
        where = f"class {cls.__qualname__}"
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise BadMethod(f"{where}: a {kind} is a subclass of {base.__name__} of {module_name}")
        for attribute in ATTRIBUTES.get(kind, ("name", "version")):
            if not hasattr(cls, attribute):
                raise BadMethod(f"{where}: a {kind} needs the class attribute '{attribute}'")
        for function in REQUIRED.get(kind, ()):
            # static: each access to a class method makes another object
            if getattr_static(cls, function) is getattr_static(base, function):
                raise BadMethod(f"{where}: a {kind} needs the function '{function}'")
        choice = ONE_OF.get(kind, ())
        if choice and all(getattr(cls, function) is getattr(base, function) for function in choice):
            raise BadMethod(f"{where}: a {kind} needs the function {' or '.join(map(repr, choice))}")
        unknown = sorted(set(getattr(cls, "uses", ())) - set(getattr(base, "may_use", ())))
        if unknown:
            raise BadMethod(f"{where}: `uses` holds {unknown[0]!r}; known: {', '.join(sorted(base.may_use))}")
        if not isinstance(cls.name, str) or not _NAME.fullmatch(cls.name):
            raise BadMethod(f"{where}: name {cls.name!r} must be lower-case letters, digits and '_', at most 40")
        if isinstance(cls.version, bool) or not isinstance(cls.version, int):
            raise BadMethod(f"{where}: version {cls.version!r} must be a whole number")
        if kind in ("metric", "detector"):
            _check_metric(cls, where)
        if kind == "detector":
            _check_detector(cls, where)
        parameters = getattr(cls, "Parameters", None)
        if not (isinstance(parameters, type) and is_dataclass(parameters) and parameters.__dataclass_params__.frozen):
            raise BadMethod(f"{where}: Parameters must be a frozen dataclass")
        taken = _methods.get((kind, cls.name))
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            origin = "another plug-in" if taken.__module__ in _plugins else taken.__module__
            raise BadMethod(f"{where}: the {kind} name '{cls.name}' is taken by {origin}; choose another name")
        _methods[kind, cls.name] = cls
        return cls

    return decorate


def _check_detector(cls: type, where: str) -> None:
    """Raise BadMethod when a detector has no direction, or sees what no detector sees."""
    if cls.direction == "none":
        raise BadMethod(f"{where}: direction 'none' must be 'higher' or 'lower'")
    if cls.reads not in READS:
        raise BadMethod(f"{where}: reads {cls.reads!r} must be one of {', '.join(map(repr, READS))}")
    if cls.reads_ending and cls.reads != "predictions":
        raise BadMethod(f"{where}: reads_ending needs reads = 'predictions' (got {cls.reads!r})")


def _check_metric(cls: type, where: str) -> None:
    """Raise BadMethod when direction, unit or range of a metric are not valid."""
    if cls.direction not in DIRECTIONS:
        raise BadMethod(f"{where}: direction {cls.direction!r} must be 'higher' or 'lower'")
    if not isinstance(cls.unit, str):
        raise BadMethod(f"{where}: unit {cls.unit!r} must be text")
    bounds = cls.range
    is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    if not is_pair or not all(type(b) in (int, float) for b in bounds) or not bounds[0] < bounds[1]:
        raise BadMethod(f"{where}: range {bounds!r} must be two numbers, the least and the greatest value")


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
    """Return the component string of a method for its identity: name, version and, unless it is bundled, code digest.

    Raises UserMistake if the code of the method cannot be read.
    """
    return f"{cls.name}@{cls.version}{_suffix(cls)}"


def encoder(cls: type) -> str:
    """Return the component string of a metric's encoder, as `component` does; the metric's code holds it."""
    return f"{cls.encoder}{_suffix(cls)}"


def _suffix(cls: type) -> str:
    return f"+{code_digest(cls)}" if is_outside(cls) else ""


def is_outside(cls: type) -> bool:
    """Return whether a method is not bundled: from a plug-in, an installed distribution, a script."""
    return cls.__module__.partition(".")[0] not in code.OURS


def code_digest(cls: type) -> str:
    """Return a digest of the code that a method consists of, as `harness.core.code` defines it: 16 hexadecimal digits.

    It is that of the code when it was first asked for, since a process does not see later edits.
    """
    name = cls.__module__
    if name not in _digests:
        path = getattr(sys.modules.get(name), "__file__", None)
        try:
            if path is None:
                raise OSError("it is not in a file")
            _digests[name] = digest_of_json(code.parts(name, Path(path), Path(path).read_bytes()))[:16]
        except (OSError, ValueError, SyntaxError) as error:
            raise UserMistake(
                f"the code of '{cls.name}' ({name}) cannot be read: {one_line(error)}; put the class into a file"
            ) from None
    return _digests[name]


def load() -> None:
    """Import the bundled methods and those of installed distributions, once."""
    global _is_loaded
    if _is_loaded:
        return
    _is_loaded = True
    for package_name in PACKAGES:
        package = _bundled(package_name)
        for module in pkgutil.walk_packages(package.__path__, f"{package_name}."):
            importlib.import_module(module.name)
    for group in GROUPS:
        for entry in importlib.metadata.entry_points(group=f"immunitybench.{group}"):
            try:
                entry.load()
            except Exception as error:
                raise UserMistake(
                    f"the entry point '{entry.name}' of group immunitybench.{group} ({entry.value}) cannot be "
                    f"loaded: {type(error).__name__}: {one_line(error)}; update or remove that distribution"
                ) from error


def _bundled(name: str) -> ModuleType:
    """Import a bundled package: the one beside `harness`, whatever the working folder holds under that name.

    Raises UserMistake where a program of the user's has imported another one.
    """
    sys.path.insert(0, str(paths.PACKAGES))
    try:
        package = importlib.import_module(name)
    finally:
        sys.path.remove(str(paths.PACKAGES))
    found = [Path(place).resolve() for place in getattr(package, "__path__", ())]
    if paths.PACKAGES.joinpath(*name.split(".")) not in found:
        other = getattr(package, "__file__", None) or ", ".join(map(str, found)) or "built in"
        raise UserMistake(
            f"the package '{name}' of ImmunityBench is hidden by {one_line(other, 300)}, which this program imported; "
            "rename that one"
        )
    return package


def load_plugins(files: Sequence[str | Path], *, is_worker: bool = False) -> None:
    """Import each `--plugin` file; its methods register themselves. An edited file is imported again.

    `is_worker`: a file that this process imported is not looked at again, so that all stages of a run have one code.
    Raises one UserMistake for all files that are missing, are not Python, fail on import or register nothing, and for
    edited modules that a file imports: Python would go on with the old ones.
    """
    load()
    mistakes: list[str] = []
    for given in files:
        try:
            _load_plugin(Path(given), is_worker)
        except UserMistake as mistake:
            mistakes += [f"--plugin {one_line(given)}{message}" for message in mistake.messages]
    if mistakes:
        raise UserMistake(mistakes)


def _load_plugin(path: Path, is_worker: bool) -> None:
    """Import one plug-in. Raises UserMistake with a message that the caller puts after the file's name."""
    try:
        path = path.resolve()  # tracebacks name the resolved path
        name = f"immunitybench_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        loaded = _plugins.get(name) if name in sys.modules else None
        if is_worker and loaded is not None:
            return
        if path.is_dir():
            raise UserMistake(": is a folder; give the path of a Python file")
        source = path.read_bytes()
    except FileNotFoundError:
        raise UserMistake(": no such file; give the path of a Python file") from None
    except (OSError, ValueError) as error:
        raise UserMistake(f": cannot be read: {one_line(getattr(error, 'strerror', None) or error)}") from None
    if path.suffix != ".py":
        raise UserMistake(": not a Python file (.py)")
    before = dict(_methods), sys.modules.get(name), loaded, _digests.get(name)
    try:
        parts = code.parts(name, path, source)
        if loaded is not None:
            if parts == loaded:
                return
            old = sorted(other for other in parts if other in sys.modules and loaded.get(other) != parts[other])
            if old:
                raise UserMistake(f": it imports {old[0]}, which was edited or is new; start a new process")
            _forget(name)
        kept = dict(_methods)
        module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
        sys.modules[name] = module
        exec(compile(source, str(path), "exec"), module.__dict__)  # the very source of which `parts` has the digest
        if code.parts(name, path, source) != parts:
            raise UserMistake(": a module that it imports was edited while it was loaded; try again")
        if kept == _methods:
            raise UserMistake(": registers no method; decorate a class with @register('defense'), 'attack' or 'metric'")
        _plugins[name], _digests[name] = parts, digest_of_json(parts)[:16]
    except (Exception, SystemExit) as error:
        _forget(name)
        methods, module, parts, digest = before
        _methods.clear()
        _methods.update(methods)
        if loaded is not None:
            sys.modules[name], _plugins[name], _digests[name] = module, parts, digest
        if isinstance(error, UserMistake):
            raise
        is_of_file = isinstance(error, SyntaxError) and error.filename in (str(path), "<unknown>")
        line = error.lineno if is_of_file else _line_in(error, path)
        what = "" if isinstance(error, BadMethod) else f"{type(error).__name__}: "
        raise UserMistake(f"{f':{line}' if line else ''}: {what}{one_line(error)}") from error


def _forget(plugin: str) -> None:
    """Forget the module of a plug-in, and the methods that it registered."""
    for method in [method for method, cls in _methods.items() if cls.__module__ == plugin]:
        del _methods[method]
    for known in (_plugins, _digests, sys.modules):
        known.pop(plugin, None)


@contextmanager
def blamed(cls: type, what: str) -> Iterator[None]:
    """Turn an exception from a plug-in's code inside the block into a UserMistake: file, line, `what` and the error.

    Exceptions of bundled methods pass unchanged: they are defects of ours.
    """
    try:
        yield
    except UserMistake:
        raise
    except Exception as error:
        if cls.__module__ not in _plugins:
            raise
        path = sys.modules[cls.__module__].__file__
        where = f"{one_line(path)}:{_line_in(error, Path(path)) or 1}"
        raise UserMistake(f"{where}: {what}: {type(error).__name__}: {one_line(error)}") from error


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
        "origin": "plug-in" if cls.__module__ in _plugins else cls.__module__,
        "summary": summary[0] if summary else "",
    }
