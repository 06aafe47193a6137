"""The table at the end of a run."""

from __future__ import annotations

import pytest

from fedexp.progress import print_table


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
