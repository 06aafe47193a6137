"""Prints what a Gin file can name.

fedexp list                     everything, by groups
fedexp list algorithms          a group
fedexp list prox                what has a text in its name or description
fedexp list configs shakes      shipped Gin files, all or those with a text
fedexp describe fedprox         one, with its parameters; or a shipped Gin file
"""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from fedexp.bindings import near
from fedexp.errors import UserError
from fedexp.reference.catalogue import (
    GROUPS,
    MOST_CONFIGS,
    REQUIRED,
    and_more,
    config_files,
    entries,
    entry,
)

_CONFIGS = "configs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a list or a description; an error is one line, and exit code 2."""
    if hasattr(signal, "SIGPIPE"):  # Such as `| head` needs no traceback.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    parser = argparse.ArgumentParser(
        prog="fedexp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    lists = commands.add_parser("list", help="names with a line each")
    lists.add_argument("words", nargs="*", help="a group, 'configs', or texts to look for")
    describes = commands.add_parser("describe", help="all about one name")
    describes.add_argument("name", help="as a Gin file has it, or of a shipped Gin file")
    given = parser.parse_args(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    try:
        if given.command == "list":
            _list(console, [word.lower() for word in given.words])
        elif given.name.endswith(".gin"):
            _print_config(console, given.name)
        else:
            _describe(console, given.name)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _list(console: Console, words: Sequence[str]) -> None:
    if words[:1] == [_CONFIGS]:
        rows = [
            (f.name, f.about)
            for f in config_files().values()
            if _has(f"{f.name} {f.about}", words[1:])
        ]
        found = {"Gin files, for --gin_file": rows}
    else:
        groups = [group for group in GROUPS if words == [group.name]]
        texts = [] if groups else words
        found = {
            f"{group.title} ({group.name})": [
                (one.name, one.summary)
                for one in entries().values()
                if one.group == group.name and _has(f"{one.name} {one.summary} {one.text}", texts)
            ]
            for group in groups or GROUPS
        }
    found = {title: rows for title, rows in found.items() if rows}
    if not found:
        names = [*entries(), *(group.name for group in GROUPS)]
        raise UserError(
            f"nothing has {' and '.join(map(repr, words))}.{near(' '.join(words), names)}"
        )
    width = max(len(name) for rows in found.values() for name, _ in rows)
    for title, rows in found.items():
        console.print(Text(f"\n{title}", style="bold"))
        _print_rows(console, rows, width)
    if not words:
        console.print(f"\n{len(config_files())} Gin files: fedexp list {_CONFIGS}", soft_wrap=True)


def _has(text: str, words: Iterable[str]) -> bool:
    return all(word in text.lower() for word in words)


def _print_rows(console: Console, rows: Iterable[tuple[str, str]], width: int) -> None:
    """A line each: cut in a terminal, whole elsewhere."""
    for name, text in rows:
        line = Text.assemble("  ", (name.ljust(width), "cyan"), "  ", text)
        if console.is_terminal:
            line.truncate(console.width, overflow="ellipsis")
        console.print(line, soft_wrap=True)


def _print_config(console: Console, name: str) -> None:
    files = config_files()
    if name not in files:
        raise UserError(
            f"fedexp ships no {name!r}.{near(name, files)} `fedexp list configs` prints all"
        )
    console.print(files[name].text, markup=False, soft_wrap=True, end="")


def _describe(console: Console, name: str) -> None:
    one = entry(name)
    console.print(Text.assemble((f"@{one.name}", "bold"), f"  ({one.group})  {one.selector}\n"))
    console.print(_filled(console, one.summary))
    for paragraph in filter(None, one.text.split("\n\n")):
        is_list = "\n  " in paragraph
        console.print(Text(f"\n{paragraph}") if is_list else _filled(console, f"\n{paragraph}"))
    console.print(Text("\nParameters", style="bold") if one.parameters else "")
    for parameter in one.parameters:
        named = (parameter.name, "cyan")
        default = "" if parameter.default == REQUIRED else f" = {parameter.default}"
        kind = f"{parameter.kind}, {REQUIRED}" if not default else parameter.kind
        console.print(Text.assemble("  ", named, default, (f"  {kind}", "dim")), soft_wrap=True)
        if parameter.text:
            console.print(_filled(console, parameter.text, indent=6))
    for title, text in one.sections.items():
        console.print(_filled(console, f"\n{title}: {text}"))
    for number in one.papers:
        console.print(f"\nhttps://arxiv.org/abs/{number}", soft_wrap=True)
    if one.configs:
        files = ", ".join(one.configs[:MOST_CONFIGS]) + and_more(one.configs)
        console.print(_filled(console, f"\nGin files: {files}"))


def _filled(console: Console, text: str, indent: int = 0) -> Text:
    """A paragraph in the width of the console; a line break before it stays."""
    margin = " " * indent
    lines = textwrap.wrap(
        text.strip(),
        console.width,
        initial_indent=margin,
        subsequent_indent=margin,
        break_on_hyphens=False,
    )
    return Text("\n" * text.startswith("\n") + "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
