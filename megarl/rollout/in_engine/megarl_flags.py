"""Runs a server's program only until its own parser has read the command line.

    python megarl_flags.py SCRIPT …     or     python megarl_flags.py -m MODULE …

Ends as soon as an argparse parser has read the command line. Standard output is then one line of JSON, `{}` or
`{"refused": MESSAGE, "options": [every flag that the parser knows]}`. It is empty if the program ended before that.
Everything that the program prints goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn


def stop_after_parsing(answer: int) -> None:
    """The first command line to be parsed will end this process, and write JSON to the file descriptor `answer`."""
    parse = argparse.ArgumentParser.parse_args

    def end(found: dict[str, Any]) -> NoReturn:
        with os.fdopen(answer, "w") as file:
            file.write(json.dumps(found))
        os._exit(0)  # the program's own exit handlers must not run

    def parse_args(self: argparse.ArgumentParser, *arguments: Any, **named: Any) -> NoReturn:
        read = vars(parse(self, *arguments, **named))
        stray = [read[action.dest] for action in self._actions if not action.option_strings and read[action.dest]]
        if stray:  # vLLM's server takes a positional argument and ignores it
            self.error(f"unrecognized arguments: {stray[0]}")
        end({})

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        end({"refused": message, "options": sorted(self._option_string_actions)})

    def leave(self: argparse.ArgumentParser, *_: Any) -> NoReturn:
        self.error("one of them, such as --help, makes the server print something and exit")

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    argparse.ArgumentParser.error = error  # type: ignore[method-assign]
    argparse.ArgumentParser.exit = leave  # type: ignore[assignment, method-assign]


def main(words: list[str]) -> None:
    stop_after_parsing(os.dup(1))
    os.dup2(2, 1)
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()  # as `python -m` has them
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
