"""The table of the algorithms, from results made up here."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks import algorithms


def run(accuracy: float, p10: float, personal: float | None = None) -> dict:
    own = {} if personal is None else {"test_personal": {"accuracy": personal, "p10": 0.5}}
    return {"test": {"accuracy": accuracy, "p10": p10}, **own}


ACCURACY = {
    "writers": {
        "settings": {"model": "dense", "rounds": 7},
        "fedavg": {"0": run(0.8, 0.6), "1": run(0.9, 0.7)},
        "scaffold": {"0": run(0.9, 0.6), "1": run(0.88, 0.6)},
        "ditto": {"1": run(0.9, 0.7, 0.95)},
    }
}


def rows(lines: list[str]) -> dict[str, list[str]]:
    split = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {cells[0]: cells for cells in split}


def test_lines_are_counted_as_the_table_says(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Doc\n\nstring."""\n\n# Why.\nx = (\n    1,  # One.\n)\n\n\ndef f():\n    """Doc."""\n'
    )
    assert algorithms.count_lines(path) == (12, 4)


def test_a_row_has_means_and_deviations_over_seeds_and_costs():
    costs = {"scaffold": {"ratio": 1.234, "cpu_ratio": 1.5}}
    found = rows(algorithms.table(ACCURACY, costs))
    assert found["fedavg"][6:] == ["", "", "85.0 ± 5.0", "65.0 ± 5.0", "", ""]
    assert found["scaffold"][6:9] == ["1.23", "1.50", "89.0 ± 1.0"]
    assert found["ditto"][8:] == ["90.0", "70.0", "95.0", "50.0"]
    assert found["fedadam"][8:] == [""] * 4
    assert found.keys() == {"algorithm", "---", *algorithms.ALGORITHMS}


def test_a_claim_shows_only_if_it_does_in_every_seed():
    found = rows(algorithms.claims(ACCURACY))
    assert found["scaffold's accuracy over fedavg's accuracy"][1] == "**+4.0 (-2.0 to +10.0)**"
    assert found["ditto's personal over fedavg's accuracy"][1] == "+5.0 (+5.0 to +5.0)"
    assert found["fedadam's accuracy over fedavg's accuracy"][1] == ""


@pytest.mark.parametrize("shipped", algorithms.ALGORITHMS.values())
def test_what_the_table_names_is_shipped(shipped):
    assert (algorithms.ROOT / "fedexp" / "algorithms" / f"{shipped.module}.py").is_file()
    assert (algorithms.ROOT / "gin_configs" / f"{shipped.config}.gin").is_file()


def test_the_table_is_written_between_the_marks(tmp_path, monkeypatch):
    results, document = tmp_path / "algorithms.json", tmp_path / "algorithms.md"
    results.write_text(json.dumps({"accuracy": ACCURACY}))
    document.write_text(f"Before.\n{algorithms.BEGIN}\nFormer text.\n{algorithms.END}\nAfter.\n")
    monkeypatch.setattr(algorithms, "RESULTS", results)
    monkeypatch.setattr(algorithms, "COSTS", tmp_path / "none.json")
    monkeypatch.setattr(algorithms, "DOCUMENT", document)
    arguments = argparse.Namespace(model="dense", write=True)
    algorithms.print_table(arguments)
    first = document.read_text()
    assert first.startswith(f"Before.\n{algorithms.BEGIN}\n") and "Former" not in first
    assert first.endswith(f"{algorithms.END}\nAfter.\n") and "85.0 ± 5.0" in first
    assert "42 clients a round, 7 rounds, model dense, 1 to 2 seeds" in first
    algorithms.print_table(arguments)
    assert document.read_text() == first
    document.write_text("No marks.")
    with pytest.raises(SystemExit, match="has no <!-- begin"):
        algorithms.print_table(arguments)
