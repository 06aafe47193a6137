"""The table at the end of a run."""

from __future__ import annotations

import pytest

from fedexp.progress import print_evaluations, print_table, without_parts


def history(num_metrics: int, rounds: int = 30) -> list[dict[str, float]]:
    names = [f"test/metric_number_{i}" for i in range(num_metrics)]
    return [
        {"round": number, **{name: number + i / 10 for i, name in enumerate(names)}}
        for number in range(1, rounds + 1)
    ]


@pytest.mark.parametrize("num_metrics", [1, 3, 17])
def test_every_metric_and_the_last_round_fit_into_the_terminal(monkeypatch, capsys, num_metrics):
    monkeypatch.setenv("COLUMNS", "100")
    print_table(history(num_metrics))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for i in range(num_metrics):
        assert f"test/metric_number_{i} " in text
    assert " 30 " in text and f" {30 + (num_metrics - 1) / 10:.4f} " in text


def test_a_run_without_evaluations_prints_nothing(capsys):
    print_table([])
    assert capsys.readouterr().out == ""


def about(name: str, clients: str = "all", parameters: str = "server's") -> dict[str, object]:
    return {
        "name": name,
        "split": "test",
        "clients": clients,
        "parameters": parameters,
        "num_clients": 3400,
        "num_examples": 77483,
    }


def test_the_last_table_says_what_was_measured(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    metrics = {
        "round": 30,
        "train/loss": 0.25,
        "test/loss": 0.5,
        **{f"test/loss/y{number}": number / 100 for number in range(62)},
        "personal/loss": 0.4,
        "personal/loss/gain": -0.1,
    }
    print_evaluations(
        30,
        [about("test"), about("personal", "taking part in training", "each client's, fine_tuning")],
        metrics,
    )
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    first, second = text.split("personal", 1)
    for part in ("after round 30", "test: all", "3,400 clients", "77,483 examples", "0.5000"):
        assert part in first
    assert "and 39 more" in first
    for part in ("-0.1000", "each client's", "fine_tuning", "taking part", "loss/gain"):
        assert part in second
    assert "0.2500" not in text


def test_parts_are_left_out_of_lines():
    metrics = {"round": 1, "train/loss": 1, "test/loss": 1, "test/loss/p10": 1, "test/a/loss": 1}
    whole = {"round", "train/loss", "test/loss", "test/a/loss"}
    assert without_parts(metrics, ["test", "test/a"]).keys() == whole
