"""Which code a method consists of, as a digest: without comments, docstrings and layout.

A method's code is its module and every module that it imports, directly or through others, from its own distribution:

- a plug-in file: the file, and imported modules that are neither installed, nor Python's, nor ours;
- an installed method: the modules below its top-level package, and those that are not installed either;
- a bundled method: the modules of the method packages, and of the rooms that compute results.

Imports are read from the source, also those inside functions, and modules are found without importing them. Imports
for types only do not count. Modules that are loaded by a computed name are not seen, and neither are data files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import os
import site
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from harness.core.memory import Memory

VERSION = 1
"""Increased when the same source gives another digest or other imports, so that remembered ones are not used."""
BUNDLED = ("defenses", "attacks", "metrics")
"""Packages of bundled methods."""
OURS = frozenset({"harness", "suites", *BUNDLED})
COMPUTING = (
    *BUNDLED, "harness.training", "harness.model", "harness.stages", "harness.contracts", "harness.core.seeds",
    "harness.core.search", "harness.core.tuning",
)  # fmt: skip
"""Packages and modules whose code computes results."""
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_F_STRING = tuple(getattr(tokenize, name, -1) for name in ("FSTRING_START", "FSTRING_END"))  # since Python 3.12


def parts(name: str, path: Path, source: bytes) -> dict[str, str]:
    """Return the digests of a module's code, by module: of `source`, the content of `path`, as "", and what it reaches.

    Raises SyntaxError or ValueError for a module that is not Python; OSError for one that cannot be read.
    """
    _file.cache_clear()  # modules may have been added
    found = reached(name, path, source, belongs_to(name))
    digests = {"": _read(path, source)[0], **{other: _read(file)[0] for other, file in found.items()}}
    _memory().save()
    return digests


def reached(name: str, path: Path, source: bytes, belongs: Callable[[str, Path], bool]) -> dict[str, Path]:
    """Return module -> file of the modules that a module reaches and that belong to it, itself apart."""
    found: dict[str, Path] = {}
    open_ = list(_imported(name, path, source))
    while open_:
        other = open_.pop()
        if other in found or other == name:
            continue
        file = _file(other)
        if file is None or not belongs(other, file):
            continue
        found[other] = file
        open_ += _imported(other, file)
    return found


def belongs_to(name: str) -> Callable[[str, Path], bool]:
    """Return the condition for a module to be of the same distribution as the module `name`."""
    root = name.partition(".")[0]
    if root in OURS:
        return lambda other, file: f"{other}.".startswith(tuple(f"{package}." for package in COMPUTING))
    return lambda other, file: other.partition(".")[0] not in OURS and (
        other.partition(".")[0] == root or not _is_installed(file)
    )


def digest_of_source(source: bytes) -> str:
    """Return a digest of Python source that comments, docstrings, blank lines and trailing blanks do not change.

    It does not depend on the version of Python, from 3.10 to 3.13. Raises SyntaxError.
    """
    digest = hashlib.sha256()
    for text in _tokens(source):
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _tokens(source: bytes) -> Iterator[str]:
    """Yield the tokens of the source that change its meaning."""
    text = source.decode(tokenize.detect_encoding(io.BytesIO(source).readline)[0]).replace("\r\n", "\n")
    lines = text.split("\n")
    idle = _idle_strings(ast.parse(text))
    start, depth = (0, 0), 0  # of nested f-strings, which older versions of Python read as one token
    is_idle = False
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _LAYOUT:
            continue
        if token.type == _F_STRING[0]:
            start = start if depth else token.start
            depth += 1
        elif token.type == _F_STRING[1]:
            depth -= 1
            if not depth:
                yield _between(lines, start, token.end)
        elif depth:
            continue
        elif token.start in idle:
            is_idle = True
        elif is_idle:  # the rest of the statement; at most a string that goes on, and the end of the line
            is_idle = token.type == tokenize.STRING
        elif token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            yield tokenize.tok_name[token.type]
        else:
            yield token.string


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """Return the text between two positions (line from 1, column from 0)."""
    own = lines[start[0] - 1 : end[0]]
    own[-1] = own[-1][: end[1]]
    own[0] = own[0][start[1] :]
    return "\n".join(own)


def _idle_strings(tree: ast.Module) -> frozenset[tuple[int, int]]:
    """Return the starts of all statements that are a string only: docstrings and the like."""
    return frozenset(
        (node.lineno, node.col_offset)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )


def _imported(name: str, path: Path, source: bytes | None = None) -> Iterator[str]:
    """Yield the names of the modules that a module may import, and of the packages that hold them."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for base, level, members in _read(path, source)[1]:
        if level:
            parts = package.split(".")
            if level > len(parts):
                continue
            base = ".".join([*parts[: len(parts) - level + 1], *filter(None, [base])])
        for each in (base, *(f"{base}.{member}" for member in members)):
            parts = each.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


_Import = tuple[str, int, tuple[str, ...]]  # module, level of a relative import, imported names


@lru_cache(maxsize=1)
def _memory() -> Memory:
    return Memory(f"code_{VERSION}.json")


def _read(path: Path, source: bytes | None = None) -> tuple[str, list[_Import]]:
    """Return (digest of the code, imports) of a file, or of `source` in its place."""
    if source is not None:
        return _analysed(source)
    return _memory().of(path, lambda file: _analysed(file.read_bytes()))


def _analysed(source: bytes) -> tuple[str, list[_Import]]:
    return digest_of_source(source), list(_imports(ast.parse(source)))


def _imports(node: ast.AST) -> Iterator[_Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, 0, ()) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or "", child.level, tuple(alias.name for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from _imports(ast.Module([other], []))
        else:
            yield from _imports(child)


@lru_cache(maxsize=4096)
def _file(name: str) -> Path | None:
    """Return the Python file of a module, without importing it; None where there is none."""
    parts = name.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    if len(parts) == 1:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder).joinpath(*parts[1:])
        for file in (base / "__init__.py", base.with_name(f"{base.name}.py")):
            if file.is_file():
                return file
    return None


@lru_cache(maxsize=1)
def _places() -> tuple[str, ...]:
    """Return the folders of Python's modules and of installed packages."""
    paths = sysconfig.get_paths()
    places = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    places |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(sorted(str(Path(place).resolve()) for place in places))


def _is_installed(file: Path) -> bool:
    return str(file.resolve()).startswith(tuple(f"{place}{os.sep}" for place in _places()))

