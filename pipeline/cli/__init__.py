"""The commands: parser, output and exit codes."""

from pipeline.cli.commands import COMMANDS, main, parser

__all__ = ["COMMANDS", "main", "parser"]
