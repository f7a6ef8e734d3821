"""The command line, run in this process."""

from tests.helpers.command_line import command

__all__ = ["command"]
