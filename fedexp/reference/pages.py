"""The reference as Markdown: a page a group of configurables, and one of the Gin files that fedexp ships."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedexp.reference.catalogue import (
    GROUPS,
    MOST_CONFIGS,
    REQUIRED,
    ConfigFile,
    Entry,
    and_more,
    config_files,
    entries,
)

_MADE = "<!-- Made by `python -m fedexp.reference`; edit docstrings and Gin files instead. -->\n"


def write(folder: Path) -> None:
    """Writes `index.md`, a page for every group and `configs.md`.

    Args:
      folder: made if it is missing; pages of these names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _pages():
        (folder / f"{name}.md").write_text(f"{_MADE}\n{text}", encoding="utf-8")


def anchor(name: str) -> str:
    """The anchor that Markdown gives a heading."""
    return re.sub(r"[^\w\s-]", "", name).strip().lower()


def _pages() -> Iterator[tuple[str, str]]:
    yield "index", _index()
    for group in GROUPS:
        found = [one for one in entries().values() if one.group == group.name]
        parts = [f"# {group.title}\n", f"{group.about}\n", *map(_section, found)]
        yield group.name, "\n".join(parts)
    files = config_files().values()
    about = "The Gin files that come with fedexp, for `--gin_file` and for `include`.\n"
    yield "configs", "\n".join(["# Gin files\n", about, *map(_config, files)])


def _index() -> str:
    lines = [
        "# Reference\n",
        "Everything that a Gin file can name. `fedexp list` and `fedexp describe NAME` print the same in a "
        "terminal. The [Gin files](configs.md) that fedexp ships use it.\n",
    ]
    for group in GROUPS:
        lines += [f"## [{group.title}]({group.name}.md)\n", "| name | |", "| --- | --- |"]
        for one in entries().values():
            if one.group == group.name:
                lines.append(_row(_link(one.name), _prose(one.summary)))
        lines.append("")
    return "\n".join(lines)


def _section(entry: Entry) -> str:
    lines = [f"## {entry.name}\n", f"`{entry.selector}`\n", f"{_prose(entry.summary)}\n"]
    lines += [f"{_prose(entry.text)}\n"] if entry.text else []
    if entry.parameters:
        lines += ["| parameter | type | default | |", "| --- | --- | --- | --- |"]
        for one in entry.parameters:
            default = one.default if one.default == REQUIRED else f"`{one.default}`"
            lines.append(_row(f"`{one.name}`", _prose(one.kind), default, _prose(one.text)))
        lines.append("")
    for name, text in entry.sections.items():
        lines.append(f"**{name}:** {_prose(text)}\n")
    if entry.configs:
        lines.append(f"**In Gin files:** {_config_links(entry.configs)}\n")
    return "\n".join(lines)


def _config(file: ConfigFile) -> str:
    used = [one.name for one in entries().values() if file.name in one.configs]
    return (
        f"## {file.name}\n\n{_prose(file.about)}\n\n```python\n{file.text.rstrip()}\n```\n\n"
        f"**Names:** {', '.join(map(_link, used))}\n"
    )


def _link(name: str) -> str:
    return f"[`{name}`]({entries()[name].group}.md#{anchor(name)})"


def _config_links(names: Sequence[str]) -> str:
    links = [f"[{name}](configs.md#{anchor(name)})" for name in names[:MOST_CONFIGS]]
    return ", ".join(links) + and_more(names)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _prose(text: str) -> str:
    """Docstrings as Markdown: nothing in them is markup but `code`; indented lines are a list."""
    text = re.sub(r"(?m)^ {2}(?=\S)(?:- )?", "- ", text)
    text = re.sub(r"(?<!\n)\n- ", "\n\n- ", text, count=1)
    pieces = re.split(r"(`[^`\n]*`)", text)
    return "".join(_code(one) if one.startswith("`") else _escaped(one) for one in pieces)


def _code(code: str) -> str:
    return _link(code.strip("`")) if code.strip("`") in entries() else code


def _escaped(text: str) -> str:
    text = re.sub(r"([\\*_\[\]<])", r"\\\1", text)
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
