"""Studies of Optuna: which point comes next by what is known so far, and which trial ends early."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gin
import numpy as np

from fedexp.errors import UserError
from fedexp.sweeps.identity import Description, check_same
from fedexp.sweeps.space import Axis, Choice, Grid, Interval, round_off, together
from fedexp.sweeps.trials import Claims, Folders, Outcome, Trial

HAS_OPTUNA = importlib.util.find_spec("optuna") is not None
if TYPE_CHECKING or HAS_OPTUNA:  # An extra.
    import optuna
if TYPE_CHECKING:
    from fedexp.sweeps.description import Sweep
# Grids need no study, and Optuna's can only be asked from within its own loop.
_LEFT_OUT = ("Base", "BruteForce", "Grid")


def _register() -> None:
    """Gives Optuna's samplers and pruners their names in Gin files."""
    for module in (optuna.samplers, optuna.pruners):
        for name in module.__all__:
            made = getattr(module, name)
            if name.endswith(("Sampler", "Pruner")) and not name.startswith(_LEFT_OUT):
                gin.external_configurable(made, name, module=module.__name__)


if HAS_OPTUNA:
    _register()
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@gin.configurable("study")
@dataclasses.dataclass(frozen=True)
class Study:
    """A study of Optuna, which needs `pip install 'fedexp[sweeps]'`.

    Attributes:
      sampler: as `@TPESampler()`, which is the default. It sees trials that are under way as bad ones, so
        that several at once do not choose the same.
      pruner: as `@MedianPruner()`; stops no trial if None. It is told of the evaluations of each trial's
        first seed, by rounds.
      storage: URL of a database, as of PostgreSQL; SQLite in the workdir if None.
      name: of the study in its storage.

    Raises:
      UserError: Optuna is missing.
    """

    sampler: Any = None
    pruner: Any = None
    storage: str | None = None
    name: str = "fedexp"

    def __post_init__(self) -> None:
        if not HAS_OPTUNA:
            raise UserError("sweep.study needs Optuna: pip install 'fedexp[sweeps]'")
        for given, kind in ((self.sampler, "samplers"), (self.pruner, "pruners")):
            base = getattr(getattr(optuna, kind), f"Base{kind[:-1].title()}")
            if given is not None and not isinstance(given, base):
                raise UserError(f"study.{kind[:-1]} must be one of Optuna's {kind}, got {given!r}")


def distribution(axis: Axis) -> Any:
    """An axis as Optuna has it: categories are places in a list."""
    space = axis.space
    if isinstance(space, Grid | Choice):
        return optuna.distributions.CategoricalDistribution([*range(len(space.values))])
    if space.integer:
        return optuna.distributions.IntDistribution(int(space.low), int(space.high), log=space.log)
    return optuna.distributions.FloatDistribution(space.low, space.high, log=space.log)


class Asked:
    """The trials that a study has asked for.

    Several processes may work on one study: each trial is one's alone, by its claim, and a trial whose
    process has died is gone on with by the next that asks.

    Args:
      sweep: with a study.
      description: that its study must be of.
      folders: of its trials.
      claims: of this process.

    Raises:
      UserError: the storage cannot be used, or holds another sweep's study of this name.
    """

    def __init__(self, sweep: Sweep, description: Description, folders: Folders, claims: Claims):
        assert sweep.study is not None and sweep.metric is not None
        self._sweep, self._plan = sweep, sweep.study
        self._folders, self._claims = folders, claims
        self._distributions = {axis.label: distribution(axis) for axis in sweep.axes}
        plan = self._plan
        storage = plan.storage or f"sqlite:///{(folders.workdir / 'study.db').absolute()}"
        patient = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite:") else {}
        with _clear_errors(storage), claims.choosing:
            self._study = optuna.create_study(
                storage=optuna.storages.RDBStorage(storage, engine_kwargs=patient),
                sampler=plan.sampler,
                pruner=plan.pruner or optuna.pruners.NopPruner(),
                study_name=plan.name,
                direction=sweep.direction,
                load_if_exists=True,
            )
            recorded = self._study.user_attrs.get("description")
            if recorded is None:
                self._study.set_user_attr("description", json.dumps(description._asdict()))
            else:
                # A seeded sampler would draw again what it drew for the trials before.
                self._study.sampler.reseed_rng()
                before = Description(**json.loads(recorded))
                check_same(f"the study {plan.name!r} is of", before, description)
        self._storage = storage

    def next(self) -> Trial | None:
        """One that nobody goes on with, or a new one."""
        with _clear_errors(self._storage), self._claims.choosing:
            for frozen in self._of(optuna.trial.TrialState.RUNNING):
                if not self._claims.take(frozen.number):
                    continue
                if frozen.params.keys() == self._distributions.keys():
                    return self._trial(frozen)
                # Its process died while it asked.
                self._study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
                self._claims.release(frozen.number)
            count = len(self._study.get_trials(deepcopy=False))
            if count >= self.total:
                return None
            if self._plan.sampler is None:
                self._study.sampler = _default_sampler(self._sweep.seed, count)
            asked = self._study.ask(self._distributions)
            self._claims.take(asked.number)
            return self._trial(self._study.get_trials(deepcopy=False)[asked.number])

    def heard(self, trial: Trial, told: Sequence[tuple[int, float]]) -> bool:
        """Tells the study; a trial to be stopped is marked as pruned."""
        with _clear_errors(self._storage):
            frozen = self._study.get_trials(deepcopy=False)[trial.number]
            asked = optuna.trial.Trial(self._study, frozen._trial_id)
            for number, value in told:
                if number not in frozen.intermediate_values:
                    asked.report(value, number)
                    if asked.should_prune():
                        self._study.tell(trial.number, state=optuna.trial.TrialState.PRUNED)
                        return True
        return False

    def done(self, trial: Trial, outcomes: Sequence[Outcome]) -> None:
        """Tells the mean over seeds, or a failure."""
        values = [one.value for one in outcomes if one.value is not None]
        with _clear_errors(self._storage):
            if len(values) == len(outcomes):
                self._study.tell(trial.number, sum(values) / len(values), skip_if_finished=True)
            else:
                fail = optuna.trial.TrialState.FAIL
                self._study.tell(trial.number, state=fail, skip_if_finished=True)
        self._claims.release(trial.number)

    def known(self) -> Sequence[tuple[Trial, bool]]:
        """All that have been asked for."""
        with _clear_errors(self._storage):
            return [
                (self._trial(frozen), frozen.state == optuna.trial.TrialState.PRUNED)
                for frozen in self._of()
                if frozen.params.keys() == self._distributions.keys()
            ]

    @property
    def total(self) -> int:
        """How many there will be."""
        assert self._sweep.num_points is not None
        return self._sweep.num_points

    def _of(self, *states: Any) -> list[Any]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _trial(self, frozen: Any) -> Trial:
        axes = self._sweep.axes
        values = [_value(axis, frozen.params[axis.label]) for axis in axes]
        return self._folders.trial(frozen.number, together(axes, values))


def _value(axis: Axis, chosen: Any) -> Any:
    space = axis.space
    if isinstance(space, Interval):
        return chosen if space.integer else round_off(chosen)
    return space.values[chosen]


def _default_sampler(seed: int, number: int) -> Any:
    """The same for a trial, whichever process asks for it."""
    of_trial = int(np.random.default_rng([seed, number]).integers(2**32))
    return optuna.samplers.TPESampler(seed=of_trial, constant_liar=True)


@contextlib.contextmanager
def _clear_errors(storage: str) -> Iterator[None]:
    """Says in one line what a storage refuses; without the password in its URL."""
    from sqlalchemy import engine, exc

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    except (optuna.exceptions.StorageInternalError, exc.SQLAlchemyError, ImportError) as error:
        with contextlib.suppress(exc.ArgumentError):
            storage = engine.make_url(storage).render_as_string(hide_password=True)
        cause = error.__cause__ or error
        raise UserError(
            f"study.storage = {storage!r}: {str(cause).strip().splitlines()[0]}"
        ) from error
