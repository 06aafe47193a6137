"""Every configurable that a Gin file can name, from Gin's registry, and the Gin files that fedexp ships."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gin
from flax import linen as nn
from gin import config as gin_config
from gin import config_parser

from fedexp import bindings, config, trainer  # noqa: F401  For Gin's names.
from fedexp.bindings.fitting import describe
from fedexp.bindings.signatures import annotations_of, own_annotations, parameters_of
from fedexp.errors import UserError
from fedexp.sweeps import description  # noqa: F401  Likewise.

REQUIRED = "required"
# Gin files that are listed for a configurable.
MOST_CONFIGS = 12
_SECTIONS = "Args|Attributes|Returns|Raises|Yields|Examples?|References?|Notes?|See also|Warnings?"


class Group(NamedTuple):
    """Configurables for one purpose.

    Attributes:
      name: as `fedexp list` and pages have it.
      title: of a page.
      about: how they are bound.
      modules: beginnings of their full names; of several groups' the longest counts.
    """

    name: str
    title: str
    about: str
    modules: Sequence[str]


GROUPS = (
    Group(
        "experiment",
        "The experiment",
        "`train` is a run, `workdir` its folder and `runtime` its processes; what else is here is bound to "
        "parameters of `train`, as `train.checkpoints = @CheckpointPlan()`.",
        ["fedexp."],
    ),
    Group(
        "datasets",
        "Data sets",
        "Bound to `train.dataset`, as `train.dataset = @emnist()`.",
        ["fedexp.data.", "fedexp.data.partition.arrays"],
    ),
    Group(
        "partitioners",
        "Partitioners",
        "Say which examples a client has, where the data do not: `csv.partition = @dirichlet()`, and so with "
        "`arrays`, `parquet` and `huggingface`.",
        ["fedexp.data.partition."],
    ),
    Group(
        "transforms",
        "Changes to data sets",
        "Take a data set and give one: `train.dataset = @split_validation()` with "
        "`split_validation.splits = @emnist()`. The `convert`s are for columns of tables.",
        [
            "fedexp.data.attackers.",
            "fedexp.data.converts.",
            "fedexp.data.noise.",
            "fedexp.data.standardizing.",
            "fedexp.data.validation.",
            "fedexp.data.words.",
        ],
    ),
    Group(
        "samplers",
        "Samplers and batches",
        "Who takes part in a round, and in which batches a client trains: `train.sampler = @uniform()`, "
        "`train.batching = @ClientBatching()`.",
        ["fedexp.data.batching.", "fedexp.data.samplers."],
    ),
    Group(
        "clock",
        "The simulated clock",
        "Samplers that know how long clients take, as `train.sampler = @synchronous()`, and the `clock` with "
        "its distributions.",
        ["fedexp.data.clock.", "fedexp.data.simulation."],
    ),
    Group(
        "tasks",
        "Tasks",
        "A model with its loss and metrics, as `train.task = @classification()`. Metrics and what prepares "
        "examples are bound to a task's parameters, without parentheses.",
        ["fedexp.tasks."],
    ),
    Group(
        "models",
        "Models",
        "Bound to a task's model, as `classification.model = @EmnistCNN()`.",
        ["fedexp.models."],
    ),
    Group(
        "algorithms",
        "Algorithms",
        "Bound to `train.algorithm` without parentheses, as `train.algorithm = @fedavg`: the run calls them "
        "with its task.",
        ["fedexp.algorithms."],
    ),
    Group(
        "optimizers",
        "Optimizers and schedules",
        "Bound in a scope that tells client and server apart: `fedavg.client_optimizer = @client/sgd()` with "
        "`client/sgd.learning_rate = 0.1`. A schedule may stand for a learning rate. Those of Optax are as "
        "in its documentation.",
        ["optimizers.", "optax."],
    ),
    Group(
        "aggregators",
        "Aggregators",
        "What happens to clients' updates on the way to the server, alone or in a list: "
        "`fedavg.aggregator = [@clip_by_norm(), @gaussian_noise(), @mean()]`.",
        ["fedexp.aggregators."],
    ),
    Group(
        "attacks",
        "Attacks",
        "`attacked` is an aggregator around another one; the attacks are bound to `attacked.attack`.",
        ["fedexp.aggregators.attacked."],
    ),
    Group(
        "strategies",
        "Strategies",
        "Where cohorts run, as `train.strategy = @mesh()`.",
        ["fedexp.engine."],
    ),
    Group(
        "evaluations",
        "Evaluations",
        "A list, as `train.evaluations = [@evaluate(), @validation/evaluate()]`; `fine_tuning` is bound to "
        "`evaluate.personalise`.",
        ["fedexp.evaluation.", "fedexp.algorithms.fine_tuning."],
    ),
    Group(
        "observers",
        "Observers",
        "Who is told how a run goes, as `train.observers = [@tensorboard(), @progress(), @json_lines()]`.",
        ["fedexp.reporting.", "fedexp.trackers."],
    ),
    Group(
        "privacy",
        "Privacy",
        "`train.privacy = @privacy()` accounts for what aggregators with noise and `canaries` tell.",
        ["fedexp.privacy.", "fedexp.aggregators.canaries."],
    ),
    Group(
        "sweeps",
        "Sweeps",
        "For the Gin file of `--sweep` alone. Samplers and pruners are Optuna's, for `study`.",
        ["fedexp.sweeps.", "optuna."],
    ),
)


class Parameter(NamedTuple):
    """What can be bound.

    Attributes:
      name: without the configurable's.
      kind: what its value must be, in words.
      default: as Python writes it; 'required' if there is none.
      text: what the docstring says of it; may be empty.
    """

    name: str
    kind: str
    default: str
    text: str


class Entry(NamedTuple):
    """A configurable.

    Attributes:
      name: the shortest by which a Gin file can have it.
      selector: its full name.
      group: what it is for.
      summary: the first sentence of its docstring.
      text: the rest, without the sections; of others' code nothing.
      parameters: what can be bound.
      sections: name -> text of the docstring's other sections; of others' code none.
      papers: arXiv numbers in the docstring.
      configs: names of the shipped Gin files that name it.
    """

    name: str
    selector: str
    group: str
    summary: str
    text: str
    parameters: Sequence[Parameter]
    sections: Mapping[str, str]
    papers: Sequence[str]
    configs: Sequence[str]


class ConfigFile(NamedTuple):
    """A Gin file that fedexp ships.

    Attributes:
      name: as `--gin_file` has it.
      about: the comment at its beginning.
      text: all of it.
      names: of configurables, as it has them.
    """

    name: str
    about: str
    text: str
    names: frozenset[str]


@functools.cache
def entries() -> Mapping[str, Entry]:
    """Name -> entry, by groups and names."""
    found = []
    for selector, configurable in gin_config._REGISTRY.items():
        if group := _group_of(selector):
            found.append(_entry(selector, configurable, group))
    order = [group.name for group in GROUPS]
    found.sort(key=lambda entry: (order.index(entry.group), entry.name.lower()))
    return {entry.name: entry for entry in found}


def entry(name: str) -> Entry:
    """The entry of a name, short or full, as `fedprox`, `@fedprox` or `fedexp.algorithms.fedprox.fedprox`.

    Raises:
      UserError: there is none, or several; with the nearest name.
    """
    known = gin_config._REGISTRY.matching_selectors(name.lstrip("@").removesuffix("()"))
    matches = [one for one in entries().values() if one.selector in known]
    if len(matches) > 1:
        raise UserError(f"{name!r} may be {' or '.join(one.selector for one in matches)}")
    if not matches:
        raise UserError(
            f"fedexp has nothing of the name {name!r}.{bindings.near(name, entries())} "
            "`fedexp list` prints all names"
        )
    return matches[0]


@functools.cache
def config_files() -> Mapping[str, ConfigFile]:
    """Name -> Gin file, those for users first, then what they include, and sweeps."""
    folder = config.shipped_configs()
    files = sorted(folder.rglob("*.gin"), key=lambda file: (len(file.parts), file))
    return {
        (name := file.relative_to(folder).as_posix()): _read(name, file.read_text())
        for file in files
    }


def and_more(configs: Sequence[str]) -> str:
    """What follows a list that was cut."""
    more = len(configs) - MOST_CONFIGS
    return f" and {more} more" if more > 0 else ""


@functools.cache
def _users() -> Mapping[str, Sequence[str]]:
    """Full name of a configurable -> the Gin files that name it."""
    found: dict[str, list[str]] = {}
    for file in config_files().values():
        for name in file.names:
            for selector in gin_config._REGISTRY.matching_selectors(name):
                found.setdefault(selector, []).append(file.name)
    return found


def _read(name: str, text: str) -> ConfigFile:
    comment = re.match(r"(?:#.*\n)*", text)
    about = re.sub(r"\s*\n?#\s*", " ", comment[0] if comment else "").strip()
    found = []

    class Noting(config_parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
            found.append(scoped_configurable_name)

        def macro(self, macro_name: str) -> None:
            """Macros are nobody's configurables."""

    for statement in config_parser.ConfigParser(text, Noting()):
        if isinstance(statement, config_parser.BindingStatement) and statement.arg_name:
            found.append(statement.selector)
    return ConfigFile(name, about, text, frozenset(one.split("/")[-1] for one in found))


def _entry(selector: str, configurable: Any, group: str) -> Entry:
    made = configurable.wrapped
    doc = inspect.getdoc(made) or ""
    summary, body, sections = _parts(doc)
    is_ours = selector.startswith(("fedexp.", "optimizers."))
    return Entry(
        name=gin_config._REGISTRY.minimal_selector(selector),
        selector=selector,
        group=group,
        summary=_plain(summary),
        text=body if is_ours else "",
        parameters=_parameters(selector, configurable),
        sections={name: text for name, text in sections.items() if is_ours},
        papers=list(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{4,5})", doc))),
        configs=_users().get(selector, ()),
    )


def _group_of(selector: str) -> str | None:
    """The group whose modules tell most of a full name; None for other libraries and users' code."""
    fitting = [
        (len(module), group.name)
        for group in GROUPS
        for module in group.modules
        if selector.startswith(module)
    ]
    return max(fitting)[1] if fitting else None


def _parameters(selector: str, configurable: Any) -> list[Parameter]:
    made = configurable.wrapped
    texts: dict[str, str] = {}
    for kind in reversed(inspect.getmro(made)) if inspect.isclass(made) else [made]:
        for doc in (kind.__doc__, getattr(vars(kind).get("__init__"), "__doc__", None)):
            texts = _items(inspect.cleandoc(doc or "")) | texts
    hidden = {*(configurable.denylist or ())}
    if inspect.isclass(made) and issubclass(made, nn.Module):
        hidden |= {"parent", "name"}
    hints = annotations_of(made)
    return [
        Parameter(name, _kind(one, hints.get(name)), _default(made, one), texts.get(name, ""))
        for name, one in parameters_of(selector).items()
        if name not in hidden and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]


def _kind(parameter: inspect.Parameter, hint: Any) -> str:
    if hint is not None:
        return describe(hint)
    annotation = parameter.annotation
    return "" if annotation is parameter.empty else inspect.formatannotation(annotation).strip("'")


def _default(made: Any, parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default in (parameter.empty, gin.REQUIRED):
        return REQUIRED
    if dataclasses.is_dataclass(made):
        field = next(f for f in dataclasses.fields(made) if f.name == parameter.name)
        if field.default_factory is not dataclasses.MISSING:
            return _source(made, parameter.name, field.default_factory)
    return getattr(default, "__name__", None) or repr(default)


def _source(made: Any, name: str, factory: Callable[[], Any]) -> str:
    """What a field's default factory makes, as its source has it."""
    for kind in inspect.getmro(made):
        if name in own_annotations(kind):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
                if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
                    made_by = [n.body for n in ast.walk(node) if isinstance(n, ast.Lambda)]
                    return ast.unparse(made_by[0]) if made_by else f"{factory.__name__}()"
    return repr(factory)


def _parts(doc: str) -> tuple[str, str, dict[str, str]]:
    """(first paragraph, the others, {section: text}) of a docstring; without its parameters."""
    body, *rest = re.split(rf"(?m)^({_SECTIONS}):\s*$\n", doc)
    summary, _, body = body.strip().partition("\n\n")
    sections = dict(zip(rest[::2], map(textwrap.dedent, rest[1::2]), strict=True))
    kept = {n: _plain(text) for n, text in sections.items() if n not in ("Args", "Attributes")}
    return " ".join(summary.split()), body.strip(), kept


def _items(doc: str) -> dict[str, str]:
    """Parameter -> what a docstring says of it."""
    _, *rest = re.split(rf"(?m)^({_SECTIONS}):\s*$\n", doc)
    found: dict[str, str] = {}
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        if name in ("Args", "Attributes"):
            _, *items = re.split(r"(?m)^\*{0,2}(\w+)(?: \([^)\n]*\))?:", textwrap.dedent(text))
            found |= {n: _plain(t) for n, t in zip(items[::2], items[1::2], strict=True)}
    return found


def _plain(text: str) -> str:
    """One line, without the roles that Sphinx has."""
    text = re.sub(r":\w+:`[~.]*([^`<]+?)(?:\s*<[^`]*>)?`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())
