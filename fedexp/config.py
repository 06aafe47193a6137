"""Gin: loading experiment files, telling typos, and comparing a workdir's config with the one at hand."""

from __future__ import annotations

import contextlib
import copy
import importlib.util  # Gin 0.5 uses it without importing it.
import inspect
import io
import logging
import os
import re
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gin
from absl import logging as absl_logging
from gin import config as gin_config

import fedexp
from fedexp import bindings as bound
from fedexp import kept, paths
from fedexp.bindings import near
from fedexp.errors import UserError, check
from fedexp.harmless import Effect, effect

# What was bound, in a run's workdir.
RECORD = "config.gin"
# What a run that has begun leaves there besides: all that was in force.
OPERATIVE = "operative_config.gin"
# What Gin raises of a file that it cannot take.
_GIN_ERRORS = (
    OSError,
    KeyError,
    ValueError,
    SyntaxError,
    ImportError,
    AttributeError,
    RuntimeError,
)
# Bindings that say how to start a run, not what the run is.
_NOT_PART_OF_THE_EXPERIMENT = ("workdir.allow_config_change",)


def load(
    files: Sequence[str],
    bindings: Sequence[str],
    imports: Sequence[str] = (),
    names: str = "fedexp.trainer",
) -> None:
    """Parses gin files and then `--gin_param` bindings, which win.

    A file is looked for relative to the current folder first, then among the configs fedexp ships; what a
    file includes, beside that file before. It may also be in a bucket, as s3://bucket/a.gin.

    Args:
      files: names or paths.
      bindings: statements.
      imports: statements for modules that the files need and do not import.
      names: the module that registers what the files may name; it is imported first.

    Raises:
      UserError: a missing file, a syntax error, a name nobody knows, with the nearest known one, or a value
        that its annotation does not admit.
    """
    importlib.import_module(names)
    if (shipped := str(shipped_configs())) not in gin_config._LOCATION_PREFIXES:
        gin.add_config_file_search_path(shipped)
    gin_config.register_file_reader(_open_remote, _is_remote_file)
    logging.getLogger().addFilter(_is_worth_logging)
    try:
        with bound.recording(), _looking_beside():
            gin.parse_config(list(imports))
            gin.parse_config_files_and_bindings(list(files), list(bindings))
    except _GIN_ERRORS as error:
        if _is_a_bug_of_an_imported_module(error):
            raise
        way_out = _suggestion(str(error))
        if isinstance(error, ModuleNotFoundError):
            way_out = f" It is looked for in {Path.cwd()} and on PYTHONPATH."
        if isinstance(error, OSError):
            way_out = "".join(map(_beside, files)) or (
                f" Neither a path from {Path.cwd()} nor one that fedexp ships: {shipped_names()}"
            )
        raise UserError(f"gin: {_one_line(error)}{way_out}") from error
    bound.check_types()
    _check_scopes()


def _beside(file: str) -> str:
    """Names the nearest one of the folder's Gin files, if one of this name is not there."""
    path = Path(file)
    stems = [] if path.exists() else [one.stem for one in path.parent.glob("*.gin")]
    return near(path.stem, stems).replace("'?", ".gin'?")


def load_from(workdir: paths.PathLike, bindings: Sequence[str]) -> None:
    """Parses what a run that has begun has in its workdir, and then bindings, which win.

    Raises:
      UserError: there is no such record, as of a run without Gin; or see `load`.
    """
    record, operative = (os.path.join(workdir, name) for name in (RECORD, OPERATIVE))
    try:
        lines = paths.read_text(operative).splitlines()
        there = paths.exists(record)
    except OSError:
        lines, there = [], False
    if not there:
        check(paths.is_remote(workdir) or os.path.isdir(workdir), f"there is no folder {workdir}")
        raise UserError(
            f"{workdir} has no {RECORD} and {OPERATIVE}, by which a run of a Gin file can be built again; "
            "of one in Python, fedexp.load_params reads the parameters"
        )
    load([record], bindings, [line for line in lines if line.startswith(("import ", "from "))])


def shipped_configs() -> Path:
    """The folder of gin files that comes with fedexp: in the package, or beside it in a checkout."""
    package = Path(fedexp.__file__).parent
    inside = package / "gin_configs"
    return inside if inside.is_dir() else package.parent / "gin_configs"


def shipped_names() -> str:
    """The names of the gin files that come with fedexp."""
    return ", ".join(sorted(path.name for path in shipped_configs().glob("*.gin")))


def bindings() -> dict[str, str]:
    """All bindings in force, {'scope/name.parameter': value as gin writes it}."""
    return {
        bound.name_of(scope, selector, parameter): bound.text_of(value)
        for (scope, selector), parameters in gin_config._CONFIG.items()
        for parameter, value in parameters.items()
    }


@gin.configurable("workdir", denylist=["path", "write"])
def prepare_workdir(
    path: str | os.PathLike, allow_config_change: bool = False, write: bool = True
) -> None:
    """Makes `path` this experiment's folder, or refuses to mix two experiments in one.

    An experiment that never began to train, for a mistake in its config, does not keep its folder. A run may
    go on with bindings that cannot change the numbers of its rounds: more rounds, another strategy.

    Args:
      path: created if missing; keeps the bindings in `config.gin`, and in comments what they were before.
      allow_config_change: go on in the folder of a different experiment, from its checkpoints.
      write: False only compares; of several processes, one writes. All write to a bucket, the same.

    Raises:
      UserError: an unwritable folder, or one whose experiment has other bindings, which are listed, or more
        rounds behind it than it is to have.
    """
    record = os.path.join(path, RECORD)
    is_remote = paths.is_remote(path)
    try:
        if not is_remote:
            os.makedirs(path, exist_ok=True)
        begun = paths.exists(os.path.join(path, OPERATIVE)) and paths.exists(record)
        recorded = paths.read_text(record) if begun else ""
        # A blank record is what a power cut may leave; it says nothing.
        changed = differences(recorded) if recorded.strip() else []
        if changed and not allow_config_change:
            _check_harmless(path, recorded)
            if write:
                bits = _effect(recorded) is Effect.LAST_BITS
                words = "; rounds from here on may have other last bits" if bits else ""
                absl_logging.info("%s goes on with %s%s", path, ", ".join(changed), words)
        if write or is_remote:  # Only writing tells whether a bucket can be written to.
            comments = [line for line in recorded.splitlines() if line.startswith("#")]
            now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            comments += [f"# {now}: {line}" for line in changed]
            paths.write(record, "".join([as_text(), *(f"{line}\n" for line in comments)]))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{record} is no text, so nobody can tell whose run this is; put back the gin file that it was, "
            "or choose another --workdir"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write to --workdir={path}: {error.strerror}") from error


def is_recorded(path: str | os.PathLike | None) -> bool:
    """Whether a workdir has kept the bindings of its run, as one of a Gin file does."""
    return path is not None and paths.exists(os.path.join(path, RECORD))


def _check_harmless(path: str | os.PathLike, recorded: str) -> None:
    """Refuses another config than the recorded one where that would make it another run."""
    if _effect(recorded) is Effect.NUMBERS:
        raise UserError(
            f"{path} holds a run of another config:\n  "
            + "\n  ".join(differences(recorded))
            + "\nChoose another --workdir, or go on in this one with "
            "--gin_param=workdir.allow_config_change=True"
        )
    train = ("", "fedexp.trainer.train")
    if "num_rounds" in gin_config._CONFIG.get(train, {}):
        check_rounds(path, max(kept.rounds(path), default=0), evaluate(train[1], "num_rounds"))


def check_rounds(path: str | os.PathLike | None, done: int, num_rounds: int) -> None:
    """Refuses fewer rounds than a run has done.

    Raises:
      UserError: there are.
    """
    check(
        done <= num_rounds,
        f"train.num_rounds is {num_rounds}, but the run in {path} has done {done}: bind as many at least, or "
        "choose another --workdir",
    )


def _effect(recorded: str) -> Effect:
    """What the bindings that differ from the recorded ones can change."""
    before, after = _both(recorded)
    values = {name: f"{before.get(name, '')} {after.get(name, '')}" for name in before | after}
    names = (name for name in values if before.get(name) != after.get(name))
    return max((effect(name, values) for name in names), default=Effect.NONE)


def check_overrides_used(overrides: Iterable[str]) -> None:
    """Refuses bindings without effect, once everything that reads them is built.

    Raises:
      UserError: a binding that nothing has read, where some are overrides or all of them are one experiment.
    """
    if list(overrides) or bound.is_experiment():
        bound.check_read(built=True)


def evaluate(selector: str, parameter: str) -> Any:
    """What Gin gives for a parameter of a configurable that is called with this value of its own."""
    value = gin_config._CONFIG[("", selector)][parameter]
    built = copy.deepcopy(value)  # Gin's way to evaluate references.
    with gin_config._OPERATIVE_CONFIG_LOCK:
        gin_config._OPERATIVE_CONFIG.setdefault(("", selector), {})[parameter] = value
    return built


def differences(recorded: str) -> list[str]:
    """Compares a recorded `as_text()` with the bindings in force, one line per differing binding."""
    before, after = _both(recorded)
    return [
        f"{name}: {before.get(name, '(unset)')} -> {after.get(name, '(unset)')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _both(recorded: str) -> tuple[dict[str, str], dict[str, str]]:
    """Bindings as they were recorded, and as they are."""
    lines = [line for line in recorded.splitlines() if not line.startswith("#")]
    before = dict(line.split(" = ", 1) for line in lines if " = " in line)
    return before, {name: value for name, value in bindings().items() if _is_experiment(name)}


def as_text() -> str:
    """The bindings in force as sorted lines of a gin file, after those that they replace.

    Without the latter, what belongs to an algorithm that was replaced would be a mistake there.
    """
    before = [(bound.name_of(*s.key), bound.text_of(s.value)) for s in bound.replaced()]
    lines = (f"{name} = {value}\n" for name, value in [*before, *sorted(bindings().items())])
    return "".join(line for line in lines if _is_experiment(line))


@contextlib.contextmanager
def _looking_beside() -> Iterator[None]:
    """Makes Gin look for an included file in the folder of the one that includes it, before elsewhere."""
    parse, under_way = gin_config.parse_config_file, []

    def parse_file(name: str, *args: Any, **kwargs: Any) -> Any:
        beside = [os.path.dirname(path) for path in under_way[-1:]]
        path = _where(name, [*beside, *gin_config._LOCATION_PREFIXES], under_way)
        under_way.append(path)
        try:
            return parse(path, *args, **kwargs)
        finally:
            under_way.pop()

    with mock.patch.object(gin_config, "parse_config_file", parse_file):
        yield


def _where(name: str, folders: Iterable[str], under_way: Sequence[str]) -> str:
    """The path of a gin file in the first folder that has it; its name if none has.

    One that is under way is passed over: my `quickstart.gin` may include the shipped one.
    """
    if os.path.isabs(name) or paths.is_remote(name):
        return name
    candidates = (os.path.join(folder, name) for folder in folders)
    return next((path for path in candidates if path not in under_way and _is_file(path)), name)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Gin logs an error for every folder it looks into in vain, also when it finds the file later."""
    return not str(record.msg).startswith("Path not found")


def _is_a_bug_of_an_imported_module(error: Exception) -> bool:
    """Whether a module that a gin file imports has raised it, and needs a traceback to be mended."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    is_importing = any(frame.f_code.co_name == "<module>" for frame in frames)
    raised_by = frames[-1].f_globals.get("__name__", "")
    return is_importing and not isinstance(error, ImportError) and not raised_by.startswith("gin.")


def _is_file(path: str) -> bool:
    if not paths.is_remote(path):
        return os.path.isfile(path)
    try:
        return paths.exists(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _is_remote_file(name: str) -> bool:
    if not paths.is_remote(name):
        return False
    if _is_file(name):
        return True
    raise UserError(f"there is no {name}, or no such bucket")


def _open_remote(name: str) -> io.StringIO:
    stream = io.StringIO(paths.read_text(name))
    stream.name = name  # Gin names it in messages.
    return stream


def _is_experiment(name: str) -> bool:
    return not name.startswith(_NOT_PART_OF_THE_EXPERIMENT)


def _check_scopes() -> None:
    """A binding whose scope no reference enters would be ignored silently."""
    entered = {
        scope
        for reference in bound.all_references()
        for scope in reference.scoped_selector.split("/")[:-1]
    }
    for scope, selector in gin_config._CONFIG:
        for part in scope.split("/"):
            if part and selector != "gin.macro" and part not in entered:
                name = gin_config._REGISTRY.minimal_selector(selector)
                raise UserError(
                    f"gin: nothing uses the scope of {scope}/{name}.{near(part, entered)}"
                )


def _suggestion(message: str) -> str:
    """Names the nearest configurable, parameter or macro to the one gin could not find."""
    if found := re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", message):
        names = [selector.split(".")[-1] for selector, _ in gin_config._REGISTRY.items()]
        return near(found[1].split("/")[-1].split(".")[-1], names)
    if found := re.search(
        r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message
    ):
        configurable = gin_config._REGISTRY.get_match(found[1])
        known = bound.signature_of(configurable.wrapped)
        return near(found[2], known) or _elsewhere(found[2])
    if "Failed to parse token" in message:
        return "; text has quotes, as 'a.csv', a reference an @, a macro a %"
    if found := re.search(r"No bindings specified for '([\w/]+)/gin.macro'", message):
        macros = [scope for scope, selector in gin_config._CONFIG if selector == "gin.macro"]
        return near(found[1], macros)
    return ""


def _elsewhere(parameter: str) -> str:
    """Names the one other configurable of fedexp that has a parameter of this name, if there is one."""
    owners = {
        configurable.name
        for selector, configurable in gin_config._REGISTRY.items()
        if selector.startswith("fedexp.")
        and parameter in inspect.signature(configurable.wrapped).parameters
    }
    return f" Did you mean '{owners.pop()}.{parameter}'?" if len(owners) == 1 else ""


def _one_line(error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.text:  # Which Gin does not show.
        where = f"{error.filename}, line {error.lineno}" if error.filename else "in a --gin_param"
        token = re.search(r"Failed to parse token ('.*')", error.msg)
        what = f"{token[1]} is no value" if token else error.msg.removesuffix(".").lower()
        return f"{error.text.strip()} ({where}): {what}"
    return " ".join(str(error).split())
