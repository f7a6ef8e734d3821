"""The command line, run in this process."""

import sys

import pytest

from ml import cli


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``breakhis``; returns (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["breakhis", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code
        else:
            code = 0
        return code, *capsys.readouterr()

    return run
