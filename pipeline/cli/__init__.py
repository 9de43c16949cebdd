"""The commands: parser, output and the one table of exit codes."""

from pipeline.cli.commands import COMMANDS, main, parser

__all__ = ["COMMANDS", "main", "parser"]
