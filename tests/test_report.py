"""The report of several runs, as a browser shows it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fedexp import compare, report, runs

pytest.importorskip("plotly", reason="needs plotly: pip install 'fedexp[report]'")

ROUNDS = (5, 10, 15)


def write(folder, bindings, accuracy, rounds=ROUNDS, **columns):
    """A finished run whose accuracy grows to the given one."""
    folder.mkdir(parents=True)
    text = "".join(f"{name} = {value}\n" for name, value in bindings.items())
    (folder / "operative_config.gin").write_text(text)
    (folder / "config.gin").write_text("")
    history = [
        {
            "round": r,
            "train/loss": 1.0,
            "test/accuracy": accuracy * r / rounds[-1],
            "test/loss": 1 - accuracy * r / rounds[-1],
            **{name: value * r for name, value in columns.items()},
        }
        for r in rounds
    ]
    (folder / "final.json").write_text(json.dumps({"history": history}))


@pytest.fixture
def grid(tmp_path):
    """Two client rates and three server rates, each with two seeds; one of the six is missing."""
    for i, (client, server, seed) in enumerate(
        itertools.product(("0.1", "0.01"), ("1.0", "0.03", "0.1"), (0, 1))
    ):
        if (client, server) != ("0.01", "1.0"):
            bindings = {"client/sgd.learning_rate": client, "server/sgd.learning_rate": server}
            bits = {f"traffic/total_bits_{way}": 100.0 + seed for way in ("up", "down")}
            write(tmp_path / f"{i:02}", bindings | {"train.seed": seed}, 0.5 + i / 100, **bits)
    return tmp_path


def read(folder):
    return [runs.read(path) for path in runs.found_in(str(folder))]


def test_runs_that_differ_in_seeds_are_one_curve(tmp_path):
    for seed, accuracy, rounds in (
        (0, 0.3, (5, 10, 15)),
        (1, 0.6, (5, 10, 15)),
        (2, 0.9, (10, 15)),
    ):
        bits = {"traffic/total_bits_up": 1.0 + seed, "traffic/total_bits_down": 2.0}
        write(tmp_path / str(seed), {"train.seed": seed, "a.b": 1}, accuracy, rounds, **bits)
    (one,) = runs.settings(read(tmp_path))
    assert one.bindings == {} and len(one.runs) == 3
    curve = one.curve("round", "test/accuracy")
    assert curve is not None
    np.testing.assert_array_equal(curve.x, [10, 15])  # Which all of them have.
    np.testing.assert_allclose(curve.mean, [0.4, 0.6])
    np.testing.assert_allclose(curve.low, [0.2, 0.3])
    np.testing.assert_allclose(curve.high, [0.6, 0.9])
    np.testing.assert_allclose(one.curve("bits", "test/accuracy").x, [40, 60])
    assert one.curve("epsilon", "test/accuracy") is None
    assert one.mean("test/accuracy") == pytest.approx(0.6) and one.mean("nothing") is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["client/sgd.learning_rate", "adam.b1"], ["learning_rate", "b1"]),
        (["client/sgd.rate", "server/sgd.rate"], ["client rate", "server rate"]),
        (["client/sgd.rate", "client/adam.rate"], ["client/sgd.rate", "client/adam.rate"]),
    ],
)
def test_bindings_are_called_by_what_tells_them_apart(names, expected):
    assert runs.shortened(names) == expected


def test_two_numbers_are_a_grid(grid):
    figures = report.effects(runs.settings(read(grid)), ["test/accuracy", "test/loss"])
    accuracy, loss = (figure.data[0] for figure in figures)
    assert accuracy.type == "heatmap"
    assert list(accuracy.x) == ["0.01", "0.1"] and list(accuracy.y) == ["0.03", "0.1", "1.0"]
    # Runs 0 to 11 in the order of the fixture, of which two are a cell; 6 and 7 are missing.
    expected = np.array([[0.585, 0.525], [0.605, 0.545], [np.nan, 0.505]])
    np.testing.assert_allclose(np.array(accuracy.z, float), expected)
    np.testing.assert_allclose(np.array(loss.z, float), 1 - expected)


def test_a_grid_for_each_of_the_rest(tmp_path):
    for i, (a, b, c) in enumerate(itertools.product(("1", "2"), ("3", "4"), ("@x", "@y"))):
        write(tmp_path / str(i), {"f.a": a, "f.b": b, "f.c": c}, i / 10)
    first, second = report.effects(runs.settings(read(tmp_path)), ["test/accuracy"])
    assert (
        first.layout.title.text == "last test/accuracy: f.c=@x" and "@y" in second.layout.title.text
    )
    np.testing.assert_allclose(np.array(first.data[0].z, float), [[0.0, 0.4], [0.2, 0.6]])
    np.testing.assert_allclose(np.array(second.data[0].z, float), [[0.1, 0.5], [0.3, 0.7]])


def test_one_number_is_an_axis(tmp_path):
    for i, (rate, seed) in enumerate(itertools.product(("1.0", "0.001", "0.1"), (0, 1))):
        write(tmp_path / str(i), {"sgd.learning_rate": rate, "train.seed": seed}, i / 10)
    (figure,) = report.effects(runs.settings(read(tmp_path)), ["test/accuracy"])
    (line,) = figure.data
    np.testing.assert_allclose(line.x, [0.001, 0.1, 1.0])
    np.testing.assert_allclose(line.y, [0.25, 0.45, 0.05])
    np.testing.assert_allclose(line.error_y.array, [0.05] * 3)
    assert figure.layout.xaxis.type == "log"


def test_more_numbers_are_parallel_coordinates(tmp_path):
    for i, (a, b, c) in enumerate(itertools.product(("0.01", "1"), ("3", "4"), ("5", "6"))):
        write(
            tmp_path / str(i), {"f.a": a, "f.b": b, "f.c": c, "f.d": "@<x>" if i else "@y"}, i / 10
        )
    (figure,) = report.effects(runs.settings(read(tmp_path)), ["test/accuracy"])
    a, b, _, d, accuracy = figure.data[0].dimensions
    np.testing.assert_allclose(a["values"], [-2] * 4 + [0] * 4)  # By logarithms.
    assert list(a["ticktext"]) == ["0.01", "1"] and list(b["values"]) == [3, 3, 4, 4] * 2
    assert list(d["values"]) == [1, *[0] * 7] and list(d["ticktext"]) == ["@<x>", "@y"]
    np.testing.assert_allclose(accuracy["values"], np.arange(8) / 10)
    assert report.effects(runs.settings(read(tmp_path)), ["other/accuracy"]) == []


def in_a_browser(page, tmp_path) -> str:
    """The document after its scripts have run, without them."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
    options += [f"--user-data-dir={tmp_path / 'chromium'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120).stdout
    assert "</html>" in shown
    return re.sub(r"<script.*?</script>", "", shown, flags=re.S)


@pytest.mark.slow
def test_a_browser_draws_and_sorts_it(grid, tmp_path, capsys):
    page = tmp_path / "report.html"
    assert compare.main([str(grid), f"--html={page}"]) == 0
    text = page.read_text()
    assert not re.search(
        r"<(script|link|img)[^>]* (src|href)=", text
    )  # It asks nobody for anything.
    clicks = """<script>
    document.querySelectorAll("table")[0].querySelectorAll("th")[3].click();
    document.querySelectorAll(".legend input")[0].click();
    </script></body>"""
    page.write_text(text.replace("</body>", clicks))
    shown = in_a_browser(page, tmp_path)
    assert "<h1>10 runs, 5 settings, 2 seeds</h1>" in shown
    assert len(re.findall(r'class="[^"]*js-plotly-plot', shown)) == 6
    assert 'data-title="Download' in shown and 'data-title="Share' not in shown
    # Four figures of curves: accuracy and loss by rounds and by bits; four of five settings are ticked.
    assert len(re.findall(r'class="trace scatter', shown)) == 4 * 4 * 2
    assert len(re.findall(r'class="js-fill', shown)) >= 4 * 4
    assert len(re.findall(r'class="hm"', shown)) == 2
    over_seeds, of_runs = re.findall(r"<tbody>(.*?)</tbody>", shown, flags=re.S)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in over_seeds.split("</tr>")[:-1]]
    assert [row[3] for row in rows] == [
        f"{mean} ± 0.0071" for mean in (0.605, 0.585, 0.545, 0.525, 0.505)
    ]
    assert rows[0][:3] == ["0.01", "0.1", "2"] and of_runs.count("<tr>") == 10


def test_what_bindings_say_is_text(tmp_path):
    for i in range(2):
        write(tmp_path / str(i), {"f.name": f"'<b>{i}</b>'"}, 0.5)
    found = read(tmp_path)
    page = report.page(found, ["<i>", "b"], ["test/accuracy"])
    body = page[page.index("<body>") :]
    assert "<i>" not in body.replace("<i style", "") and "&lt;i&gt;" in body
    assert "<b>" not in re.sub(r"<script.*?</script>", "", body, flags=re.S)


def test_without_plotly_the_way_out_is_said(grid, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert compare.main([str(grid), "--html=report.html"]) == 2
    assert capsys.readouterr().err == "error: --html needs plotly: pip install 'fedexp[report]'\n"
