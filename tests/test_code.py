"""Which code a method consists of: what changes its digest, and which modules it reaches."""

from __future__ import annotations

import importlib
import sys
import textwrap
from pathlib import Path

import pytest

from harness.core import code, registry
from harness.core.errors import UserMistake
from tests.conftest import run_python
from tests.test_registry import DEFENSE

SOURCE = '''\
"""Docstring."""
X = "# no comment"  # a comment


class A:
    """Docstring."""

    y: int = 1
    """Docstring of an attribute."""

    def f(self):
        """Docstring."""
        return f"{X} and {self.y:>{3}}", """two

lines"""
'''
SAME = {
    "comment": ("# a comment", "# another"),
    "no comment": ("  # a comment", ""),
    "docstring": ('"""Docstring."""\nX', '"""Other\n\nwords."""\nX'),
    "no docstring": ('        """Docstring."""\n        return', "        return"),
    "docstring of an attribute": ("    \"\"\"Docstring of an attribute.\"\"\"\n", ""),
    "blank lines": ("\n\n\nclass", "\n\nclass"),
    "trailing blanks": ("y: int = 1", "y: int = 1   "),
    "ends of lines": ("\n", "\r\n"),
    "spaces between tokens": ("y: int = 1", "y:  int=1"),
}
OTHER = {
    "a string that looks like a comment": ('"# no comment"', '"# a comment"'),
    "a line of a string": ("two\n\nlines", "two\nlines"),
    "an f-string": ("{X} and", "{X}, and"),
    "a format of an f-string": (":>{3}", ":>{4}"),
    "a value": ("= 1", "= 2"),
    "a name": ("def f", "def g"),
}


@pytest.mark.parametrize("change", SAME)
def test_what_changes_no_meaning_changes_no_digest(change):
    """Comments, docstrings, layout."""
    other = SOURCE.replace(*SAME[change])

    assert other != SOURCE
    assert code.digest_of_source(other.encode()) == code.digest_of_source(SOURCE.encode())


@pytest.mark.parametrize("change", OTHER)
def test_what_changes_the_meaning_changes_the_digest(change):
    """Also inside strings."""
    other = SOURCE.replace(*OTHER[change])

    assert other != SOURCE
    assert code.digest_of_source(other.encode()) != code.digest_of_source(SOURCE.encode())


def test_a_level_of_indentation_changes_the_digest():
    """The tokens of a line are the same."""
    one, other = "if x:\n    y()\n    z()\n", "if x:\n    y()\nz()\n"

    assert code.digest_of_source(one.encode()) != code.digest_of_source(other.encode())


def test_the_digest_is_pinned():
    """Keys of plug-ins must be the same on every machine and under every version of Python."""
    assert code.digest_of_source(SOURCE.encode())[:16] == "02c4421bbbe59350"


@pytest.fixture
def folder(tmp_path, monkeypatch, unregister) -> Path:
    """A folder on the path, of which nothing is imported after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    code._file.cache_clear()
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    code._file.cache_clear()


def write(folder: Path, **sources: str) -> None:
    """Write modules; __ in a name is a dot."""
    for name, source in sources.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
    importlib.invalidate_caches()


def names(folder: Path, source: str, name: str = "plugin") -> set[str]:
    """Return the modules that a plug-in reaches."""
    return set(code.reached(name, folder / f"{name}.py", textwrap.dedent(source).encode(), code.belongs_to(name)))


def test_a_plugin_reaches_its_helpers_and_theirs(folder):
    """At the top, in functions, relative, in circles; neither Python's modules nor installed ones nor ours."""
    write(
        folder,
        helper="import helper_of_helper\nimport plugin_circle",
        helper_of_helper="from own_package.inner import value",
        plugin_circle="import helper",
        late="",
        typed="",
        own_package__inner="from . import sibling\nfrom .sibling import other",
        own_package__sibling="import json, numpy, torch, harness.api",
        unused="",
    )
    (folder / "own_package" / "__init__.py").write_text("")

    reached = names(
        folder,
        """
        import json, numpy, not_installed_anywhere
        from typing import TYPE_CHECKING
        from harness.api import Defense
        import helper
        if TYPE_CHECKING:
            import typed
        def f():
            import late
        """,
    )

    assert reached == {
        "helper", "helper_of_helper", "plugin_circle", "own_package", "own_package.inner", "own_package.sibling", "late"
    }  # fmt: skip


def test_a_bundled_method_reaches_what_computes_results():
    """Its own packages and the rooms of training, model and stages; no tables, no suite."""
    path = Path(sys.modules[registry.get("defense", "mima").__module__].__file__)
    reached = set(code.reached("defenses.mima", path, path.read_bytes(), code.belongs_to("defenses.mima")))

    assert {"harness.training.bilevel", "harness.training.merge"} <= reached
    assert all(f"{name}.".startswith(tuple(f"{package}." for package in code.COMPUTING)) for name in reached)


def component() -> str:
    """Return the component of the plug-in's defense."""
    return registry.component(registry.get("defense", "mine"))


def test_an_edit_of_a_helper_is_another_method(folder):
    """In another process: one process cannot have both. A comment is no edit."""
    (folder / "plugin.py").write_text("import helper\n" + DEFENSE)
    program = (
        "from harness.core import registry; registry.load_plugins(['plugin.py']); "
        "print(registry.component(registry.get('defense', 'mine')))"
    )
    found = []
    for helper in ("x = 1", "x = 1  # as before", "x = 2"):
        write(folder, helper=helper)
        found.append(run_python("-c", program, cwd=folder).stdout)

    assert found[0].startswith("mine@1+")
    assert found[0] == found[1] != found[2]


def test_an_edited_helper_is_refused_where_the_old_one_is_imported(folder):
    """Python would go on with the old one, under the key of the new one."""
    write(folder, helper="x = 1")
    (folder / "plugin.py").write_text("import helper\n" + DEFENSE)
    registry.load_plugins([folder / "plugin.py"])
    before = component()

    write(folder, helper="x = 22")
    with pytest.raises(UserMistake, match="plugin.py: it imports helper, which was edited or is new; start a new proc"):
        registry.load_plugins([folder / "plugin.py"])
    assert component() == before

    write(folder, helper="x = 1  # as it was")
    registry.load_plugins([folder / "plugin.py"])


def test_a_worker_keeps_the_code_that_it_imported(folder):
    """A file that is edited while a run goes on is imported by no worker that has it already."""
    path = folder / "plugin.py"
    path.write_text(DEFENSE)
    registry.load_plugins([path])
    before = component()
    path.write_text(DEFENSE + "\nEDITED = 1\n")

    registry.load_plugins([path], is_worker=True)
    assert component() == before
    registry.load_plugins([path])
    assert component() != before


@pytest.mark.parametrize("edit", ["version", "helper"])
def test_an_installed_method_is_known_by_its_code(folder, edit):
    """A new version of a distribution, or an edit of a module that its method imports."""
    package = folder / "lab_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("x = 1")
    (package / "method.py").write_text("from lab_methods.helper import x\n" + DEFENSE)
    info = folder / "lab_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[immunitybench.defenses]\nmine = lab_methods.method:Mine\n")
    program = "from harness.core import registry; print(registry.component(registry.get('defense', 'mine')))"
    run = lambda: run_python("-c", program, cwd=folder)  # noqa: E731
    before = run()
    assert before.stdout.startswith("mine@1+"), before.stderr
    if edit == "version":
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-methods\nVersion: 2.0\n")
        (package / "method.py").write_text("from lab_methods.helper import x\nNEW = 2\n" + DEFENSE)
    else:
        (package / "helper.py").write_text("x = 22")

    assert run().stdout not in ("", before.stdout)
