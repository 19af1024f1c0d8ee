"""How a program ends: by SIGTERM, by a reader that has ended, on streams that are closed or cannot show everything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from harness.core import termination
from tests.conftest import run_python


def test_sigterm_is_an_interrupt_inside_the_block_alone():
    """The handler of before is put back."""
    before = signal.getsignal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), termination.as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_ignored_sigterm_stays_ignored():
    """Somebody decided so."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with termination.as_interrupt():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_has_the_exit_code_of_ctrl_c(project, monkeypatch):
    """While a suite is being read."""
    monkeypatch.setattr("harness.commands.opened.load", lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    outcome = project.validate()

    assert (outcome.code, outcome.err) == (130, "interrupted\n")


def started(*arguments: str, **options) -> subprocess.Popen:
    """Start the command line with its error stream in a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments], stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(("given", "code"), [(("plan", "smoke"), 0), (("run", "smoke", "--executor", "serial"), 130)])
def test_a_reader_that_ends_is_no_error(given, code, tmp_path):
    """As in `plan smoke | head -1`: nothing on the error stream. A run that ends so has not done its work."""
    reading, writing = os.pipe()
    os.close(reading)
    process = started(*given, "--runs", str(tmp_path), stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=120)

    assert (process.returncode, err) == (code, "")


def test_closed_standard_output_is_no_error():
    """As in `plan smoke >&-`."""
    process = started("plan", "smoke", preexec_fn=lambda: os.close(1))
    _, err = process.communicate(timeout=120)

    assert (process.returncode, err) == (0, "")


def test_a_file_that_is_opened_does_not_become_standard_output(tmp_path):
    """With a closed one, the next file would get its number."""
    code = (
        "import os; from harness.core import streams; streams.prepare(); print('x'); "
        f"print(open({str(tmp_path / 'file')!r}, 'w').fileno() > 2, file=open({str(tmp_path / 'seen')!r}, 'w'))"
    )
    subprocess.run([sys.executable, "-c", code], preexec_fn=lambda: os.close(1), check=True, timeout=60)

    assert (tmp_path / "seen").read_text() == "True\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_cannot_be_printed_are_replaced(encoding):
    """A terminal or a pipe of another encoding: the results are there, one sign is not."""
    code = "import sys; from harness.core import streams; streams.prepare(); print('a★b'); print('c★', file=sys.stderr)"

    finished = run_python("-c", code, PYTHONIOENCODING=encoding)

    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "a?b\n", "c?\n")


def test_names_of_a_suite_that_cannot_be_printed_are_replaced(project):
    """From the command line."""
    text = project.suite.read_text(encoding="utf-8").replace("name: small", "name: small\ndescription: ★")
    assert "★" in text
    project.suite.write_text(text, encoding="utf-8")
    renamed = project.suite.rename(project.suite.with_name("größe★.yaml"))

    finished = run_python("-m", "harness", "validate", str(renamed), PYTHONIOENCODING="ascii", PYTHONUTF8="0")

    assert (finished.returncode, finished.stderr) == (0, "")
    assert "gr??e?.yaml: valid" in finished.stdout
