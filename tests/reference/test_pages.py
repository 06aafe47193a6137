"""The reference has everything that a Gin file can name, and its links lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from gin import config as gin_config

import fedexp
from fedexp import reference
from fedexp.config import shipped_configs
from fedexp.reference.catalogue import GROUPS, config_files, entries, entry

PACKAGE = Path(fedexp.__file__).parent


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reference") / "below"
    reference.write(folder)
    return {file.name: file.read_text() for file in folder.iterdir()}


def decorated_in_source() -> set[str]:
    """Names of `@gin.configurable`s, told from the source alone."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            for one in getattr(node, "decorator_list", []):
                call = one if isinstance(one, ast.Call) else None
                if ast.unparse(call.func if call else one) == "gin.configurable":
                    given = (
                        [a.value for a in call.args if isinstance(a, ast.Constant)] if call else []
                    )
                    found.add(given[0] if given else node.name)
    return found


def test_every_configurable_of_the_source_has_an_entry_in_a_group():
    in_source = decorated_in_source()
    assert len(in_source) > 100
    assert in_source <= {one.selector.rpartition(".")[2] for one in entries().values()}
    assert {one.group for one in entries().values()} == {group.name for group in GROUPS}


def test_every_entry_has_a_summary():
    assert [one.selector for one in entries().values() if not one.summary] == []


def test_every_parameter_of_our_own_is_described():
    ours = [
        one for one in entries().values() if one.selector.startswith(("fedexp.", "optimizers."))
    ]
    assert len(ours) > 100
    assert [f"{one.name}.{p.name}" for one in ours for p in one.parameters if not p.text] == []


def test_every_name_of_every_shipped_gin_file_is_in_the_reference(pages):
    texts = {file: (shipped_configs() / file).read_text() for file in config_files()}
    named = {n for text in texts.values() for n in re.findall(r"@(?:\w+/)*([A-Za-z]\w*)", text)}
    named |= {
        n
        for text in texts.values()
        for n in re.findall(r"(?m)^(?:\w+/)*([A-Za-z]\w*)\.\w+ =", text)
    }
    assert len(named) > 60
    headings = {h for text in pages.values() for h in re.findall(r"(?m)^## ([\w.]+)$", text)}
    assert named <= headings
    for file, text in texts.items():
        for name in re.findall(r"@(?:\w+/)*([A-Za-z]\w*)", text):
            assert file in entry(name).configs


def test_every_link_leads_to_a_heading_of_a_page(pages):
    slugs = {
        name: {re.sub(r"[^\w\s-]", "", h).lower() for h in re.findall(r"(?m)^#+ (.+)$", text)}
        for name, text in pages.items()
    }
    links = [
        link for text in pages.values() for link in re.findall(r"\]\(([\w.]+\.md[^)]*)\)", text)
    ]
    assert len(links) > 500
    for link in links:
        page, _, heading = link.partition("#")
        assert page in slugs
        assert not heading or heading in slugs[page], link


def test_a_section_has_parameters_defaults_paper_and_gin_files(pages):
    section = pages["algorithms.md"].split("\n## fedprox\n")[1].split("\n## ")[0]
    assert "[arXiv:1812.06127](https://arxiv.org/abs/1812.06127)" in section
    assert "| `mu` | float | required | of the proximal term, at first; 0 is FedAvg. |" in section
    assert "| `mu_patience` | int | `5` | 5 in the paper. |" in section
    assert "see [`fedavg`](algorithms.md#fedavg)" in section
    assert "[emnist_fedprox.gin](configs.md#emnist_fedproxgin)" in section


def test_what_python_alone_gives_cannot_be_bound():
    assert [one.name for one in entry("workdir").parameters] == ["allow_config_change"]
    assert "parent" not in [one.name for one in entry("EmnistCNN").parameters]


def test_defaults_that_are_made_are_shown_as_their_source():
    defaults = {one.name: one.default for one in entry("train").parameters}
    assert defaults["observers"] == "[TensorBoard(), Progress()]"
    assert defaults["sampler"] == "uniform()"
    assert defaults["dataset"] == "required"


def test_optax_is_in_it_with_its_defaults():
    eps = {one.name: one for one in entry("optax.rmsprop").parameters}["eps"]
    assert (eps.kind, float(eps.default)) == ("float", 1e-8)
    assert gin_config._REGISTRY["optax.rmsprop"] and eps.text


def spans(page: Path) -> list[str]:
    """What a document has in backticks; of the tables about other frameworks our side."""
    lines = page.read_text().splitlines()
    if page.name == "faq.md":
        lines = [line.split("|")[-2] if line.startswith("| ") else line for line in lines]
    return re.findall(r"`([^`\n]+)`", "\n".join(lines))


# Names that are examples of a reader's own, and what is no name of Gin's.
OWN = {"MyNet", "Linen", "Nnx", "my_module", "to_ids", "above", "database", "name", "gin"}
ENDINGS = {"py", "gin", "md", "json", "csv", "db"}


@pytest.mark.parametrize(
    "page", sorted((PACKAGE.parent / "docs").glob("*.md")), ids=lambda p: p.stem
)
def test_documents_bind_names_and_parameters_that_there_are(page):
    known: dict[str, set[str]] = {}
    for one in entries().values():
        for name in {one.name, one.name.rpartition(".")[2]}:
            known.setdefault(name, set()).update(p.name for p in one.parameters)
    for span in spans(page):
        for name in re.findall(r"@(?:\w+/)*([A-Za-z]\w*)", span):
            assert name in known or name in OWN, span
        for name, of in re.findall(r"(?<![\w./'])(?:\w+/)*([A-Za-z]\w*)\.([a-z]\w*)", span):
            assert name not in known or of in known[name] | ENDINGS, span


def test_classes_that_questions_name_are_of_the_source():
    defined = {
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    page = PACKAGE.parent / "docs" / "faq.md"
    ours = {line.split("|")[-2] for line in page.read_text().splitlines() if line[:2] == "| "}
    named = {
        name
        for cell in ours
        for span in re.findall(r"`([^`]+)`", cell)
        for name in re.findall(r"(?<!@)\b[A-Z][a-z]+[A-Z]?\w*", span)
    }
    assert len(named) > 10 and named - {"None", "True", "ClientResult"} <= defined  # That is TFF's.
