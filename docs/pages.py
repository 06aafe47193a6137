"""Pages of the site that are not Markdown in docs/: MkDocs calls `on_files` as its hook.

README.md is the home page, and the reference is made from the code. Whatever else of the repository a page
links to becomes a page, too, code and folders as listings: links lead to the same here and in the repository,
and MkDocs checks them all. Tutorials have what they print and draw, where their tests have run them.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import jupytext
import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert.filters import strip_ansi

from fedexp import reference

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
EXECUTED = ROOT / "build" / "tutorials"
ALWAYS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
LISTED = {".gin": "python", ".py": "python", ".sh": "bash", ".toml": "toml", ".yaml": "yaml"}
TARGET = re.compile(r"(?<=\]\()[^()#\s]+")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the reference, the files that are always there, and those that pages link to."""
    found = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    found += ALWAYS + TUTORIALS
    for path in found:  # It grows on the way.
        file = files.get_file_from_path(_uri(path))
        if file is None:
            file = File.generated(config, _uri(path), abs_src_path=str(path))
            files.append(file)
        if path in TUTORIALS:
            markdown, pictures = tutorial(path, EXECUTED / f"{path.stem}.ipynb")
            for name, content in pictures.items():
                files.append(File.generated(config, f"tutorials/{name}", content=content))
        elif file.is_documentation_page():
            markdown = _markdown(path)
        else:
            continue
        file.content_string = _turned(markdown, path, found)
    with tempfile.TemporaryDirectory() as folder:
        reference.write(Path(folder))
        for page in Path(folder).iterdir():
            content = page.read_text()
            files.append(File.generated(config, f"reference/{page.name}", content=content))


def tutorial(path: Path, executed: Path) -> tuple[str, dict[str, bytes]]:
    """A tutorial as Markdown, and the pictures that it draws, by file name.

    Args:
      path: how it is written, a jupytext file.
      executed: the notebook that its run has left; without it, or of another text, there are no outputs.
    """
    notebook = jupytext.read(path)
    if executed.exists():
        run = jupytext.read(executed)
        if [cell.source for cell in run.cells] == [cell.source for cell in notebook.cells]:
            notebook = run
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata.setdefault("language_info", {"name": "python"})
    markdown, resources = nbconvert.MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": path.stem}
    )
    return strip_ansi(markdown), resources["outputs"]


def _turned(markdown: str, path: Path, found: list[Path]) -> str:
    """Turns a file's links to others of the repository into links between pages, and finds these."""

    def target(match: re.Match) -> str:
        other = Path(os.path.normpath(path.parent / match[0]))
        if not (other.is_relative_to(ROOT) and other.exists()):
            return match[0]
        if (other / "README.md").exists():
            other = other / "README.md"
        if other not in found:
            found.append(other)
        return os.path.relpath(_uri(other), os.path.dirname(_uri(path)))

    return TARGET.sub(target, markdown)


def _uri(path: Path) -> str:
    """Where a file of the repository is among the pages."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    name = name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"
    if path.is_dir():
        return f"{name}/index.md"
    if path in TUTORIALS:
        return name.removesuffix(".py") + ".md"
    return f"{name}.md" if path.suffix in LISTED else name


def _markdown(path: Path) -> str:
    title = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        return f"# {title}\n\n" + "".join(f"- [{name}]({path.name}/{name})\n" for name in files)
    if path.suffix in LISTED:
        return f"# {title}\n\n``````{LISTED[path.suffix]}\n{path.read_text()}``````\n"
    return path.read_text()
