"""Evaluates what a run has saved, with its own config or other evaluations.

    python -m fedexp.evaluate WORKDIR --gin_param="evaluate.split = 'validation'"

It prints a table and writes `evaluation.json` to the workdir, in which nothing else changes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedexp.session import Round, Session
    from fedexp.snapshots import Snapshot

NAME = "evaluation.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the evaluations; an error is one line, and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fedexp.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="of a run; also s3:// or gs://")
    parser.add_argument(
        "--latest",
        action="store_true",
        help="the latest checkpoint; default: the best one, by CheckpointPlan.best_metric",
    )
    parser.add_argument(
        "--gin_param",
        action="append",
        default=[],
        help="Gin binding that overrides the run's; may be repeated",
    )
    given = parser.parse_args(arguments)
    # Imported here, so that --help and a mistyped flag answer at once.
    import jax

    from fedexp import config, paths, progress, runtime, snapshots
    from fedexp.errors import UserError, check
    from fedexp.main import experiment, without_gin_frames
    from fedexp.session import Session, row

    try:
        config.load_from(given.workdir, given.gin_param)
        runtime.start()  # Before anything asks JAX for devices, as reading a checkpoint does.
        found = snapshots.read(given.workdir, best=not given.latest)
        check(jax.process_count() == 1, "fedexp.evaluate is for one process; start it alone")
        session = Session(experiment())
        config.check_overrides_used(given.gin_param)
        check(session.evaluations, "train.evaluations is empty; bind some, as [@evaluate()]")
        session.check_evaluations()
        with tempfile.TemporaryDirectory(prefix="fedexp-states-") as scratch:
            round_ = restored(session, found, Path(given.workdir), Path(scratch))
            results = session.evaluate(round_, range(len(session.evaluations)), full=True)
        for name, fingerprint in found.metadata.get("data", {}).items():
            if name in session.splits and session.splits[name].fingerprint() != fingerprint:
                print(
                    f"the {name} split has other clients or examples than in the run",
                    file=sys.stderr,
                )
        metrics, about = row(results), [one._asdict() for one in session.about(round_)]
        told = {
            "round": found.round,
            "best_by": found.metric,
            "metrics": metrics,
            "evaluations": about,
            "gin_params": given.gin_param,
        }
        path = os.path.join(given.workdir, NAME)
        try:
            paths.write(path, json.dumps(told, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    except UserError as error:
        print(f"error: {without_gin_frames(str(error))}", file=sys.stderr)
        return 2
    progress.print_evaluations(found.round, about, metrics)
    print(f"of the {f'best by {found.metric}' if found.metric else 'latest'}; also in {path}")
    return 0


def restored(session: Session, found: Snapshot, workdir: Path, scratch: Path) -> Round:
    """A round of a session as a checkpoint has it, with the states of clients.

    Args:
      session: where it goes; it has not trained.
      found: the checkpoint.
      workdir: in which it is.
      scratch: an empty folder for copies of clients' states, which are needed as long as the round.

    Raises:
      UserError: it is of another experiment or of other data, or damaged.
    """
    from fedexp.checkpointing import filled, template_of
    from fedexp.engine.state_store import processes_of
    from fedexp.errors import UserError, check
    from fedexp.session import Round

    states = session.engine.client_states
    template = template_of(session.first.state, states.template() if states else {})
    saved = filled(template, found.arrays, found.path)
    if states:
        of = found.metadata["data"]
        check(
            of["train"] == session.splits["train"].fingerprint(),
            f"the checkpoint {found.path} has states of other clients; bind the data that it was made with",
        )
        if (store := found.metadata["client_states"]) is None:
            states.load(saved["clients"])
        else:
            # By another name, for a store of the same one would be emptied.
            name = f"run-{processes_of(store)}"
            (scratch / name).symlink_to((workdir / "client_states" / store).absolute())
            try:
                states.keep_in(scratch, found.round).take(name, found.round)
            except (OSError, ValueError) as error:
                raise UserError(f"the checkpoint {found.path} is damaged: {error}") from error
    return Round(session, found.round, saved["server"])


if __name__ == "__main__":
    from fedexp.main import leave

    signal.signal(signal.SIGINT, leave)
    sys.exit(main())
