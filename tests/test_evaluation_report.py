"""Reports: complete, self-contained, escaped, and no stronger in words than their numbers."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from evaluation_standins import write_run

from configs import fields
from evaluation import EvaluationError, comparison, plots, report, runs, words
from evaluation.compared import Compared
from evaluation.visibility import views

VOID = {"meta", "img", "br", "use"}


class Checker(html.parser.HTMLParser):
    """Every element is closed; addresses are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.addresses, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)


def check(page: str) -> str:
    """The page's words, after checks of its form."""
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in checker.addresses)
    style = re.sub(r"url\(#[\w-]+\)", "", page)
    assert not re.search(r"@import|url\(|<script|<link", style)
    return " ".join(" ".join(checker.words).split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / name, name) for name in ("gqa", "sliding", "lightning")]


@pytest.fixture(scope="module")
def page(folders):
    return report.render(runs.read(folders), command="python train.py --sweep=x.py")


def test_many_runs_make_one_self_contained_page(page, folders):
    said = check(page)
    for run in runs.read(folders):
        assert run.name in said
        value, error = run.metric("heldout", "bits_per_byte")
        assert f"{value:.3f} ± {error:.3f}" in said
    for heading in (
        "At a glance",
        "Learning",
        "Quality and speed",
        "Quality against cost",
        "What a token sees",
        "Samples",
    ):
        assert heading in said
    assert "model.attention.window" in said  # Where the configs differ.
    assert "python train.py --sweep=x.py" in said
    assert "prefers-color-scheme: dark" in page and "var(--series-1)" in page
    assert not re.search(r"(?:fill|stroke): ?#(?:1b1f24|2f6fb7)", page)  # Pictures follow the page's colours.


def test_texts_are_escaped(page):
    assert "&lt;self&gt;.value &amp; 1" in page and "<self>" not in page


def test_the_headline_says_what_the_paired_test_says(folders):
    found = runs.read(folders)
    said = check(report.render(found))
    ordered = sorted(found, key=lambda run: run.metric("heldout", "bits_per_byte")[0])
    assert f"{ordered[0].name} is lowest on held-out text" in said
    twin = dataclasses.replace(found[0], name="twin", config=fields.apply(found[0].config, {"log.every": 7}))
    assert "not distinguishable from it: 0.000 ± 0.000 below" in check(report.render([found[0], twin]))


def test_one_run_alone(folders):
    said = check(report.render(runs.read(folders[:1])))
    assert "reaches" in said and "Where the configs differ" not in said and "Δ" not in said


def test_a_run_without_evaluation_or_metrics_still_makes_a_page(tmp_path):
    folder = write_run(tmp_path / "bare", "gqa", evaluated=False)
    (folder / "metrics.jsonl").unlink()
    (folder / "samples.jsonl").unlink()
    assert "not been evaluated" in check(report.render(runs.read([folder])))


def test_seeds_of_a_variant_are_summed_up(tmp_path):
    folders = [
        write_run(tmp_path / f"{name}{seed}", name, seed=seed) for name in ("gqa", "sliding") for seed in (0, 1, 2)
    ]
    compared = Compared(runs.read(folders))
    assert [variant.members for variant in compared.variants] == [(0, 1, 2), (3, 4, 5)]
    assert [variant.name for variant in compared.variants] == ["gqa", "sliding"]
    assert compared.series == [0, 0, 0, 1, 1, 1]
    said = check(report.render(compared.runs))
    values = [compared.heldout(index)[0] for index in (0, 1, 2)]
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / np.sqrt(3):.3f}" in said
    assert "over 3 seeds" in said


def test_costs_are_the_models_own(folders):
    import jax
    from flax import nnx

    import models

    run = runs.read(folders)[0]
    model = nnx.eval_shape(lambda: models.build(run.config.model, vocab_size=259, rngs=nnx.Rngs(0)))
    cost = report.cost(run)
    assert cost.parameters == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert (
        cost.cache_bytes == 4 * 2 * run.config.model.attention.kv_heads * 32 * 4
    )  # layers, k and v, heads, width, bytes.
    speed = run.series("tokens_per_second")[1]
    assert cost.throughput == pytest.approx(np.median(speed), rel=0.02)


def test_the_terminal_table_agrees(folders):
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(comparison.table(folders))
    said = console.export_text()
    for run in runs.read(folders):
        assert f"{run.metric('heldout', 'bits_per_byte')[0]:.3f}" in said


def test_folders_that_are_no_runs_are_named(tmp_path):
    with pytest.raises(EvaluationError, match="does not exist"):
        report.write([tmp_path / "nowhere"], tmp_path / "r.html")
    with pytest.raises(EvaluationError, match="has no config.json"):
        report.write([tmp_path], tmp_path / "r.html")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EvaluationError, match="is damaged"):
        report.write([tmp_path], tmp_path / "r.html")
    with pytest.raises(EvaluationError, match="at least one"):
        report.write([], tmp_path / "r.html")


def test_lines_cut_short_are_left_out_and_told(tmp_path):
    folder = write_run(tmp_path / "cut", "gqa", evaluated=False)
    metrics = folder / "metrics.jsonl"
    whole = len(metrics.read_text().splitlines())
    metrics.write_text(metrics.read_text()[:-20])
    (run,) = runs.read([folder])
    assert len(run.metrics) == whole - 1
    assert "1 unreadable line left out" in check(report.render([run]))


def test_a_step_written_again_counts_once_and_metrics_join(tmp_path):
    folder = write_run(tmp_path / "again", "gqa", steps=10, evaluated=False)
    with open(folder / "metrics.jsonl", "a") as lines:
        for line in ({"step": 10, "loss": 99.0}, {"step": 10, "eval/heldout/bits_per_byte": 2.5}):
            lines.write(json.dumps(line) + "\n")
    (run,) = runs.read([folder])
    assert list(run.series("loss")[0]) == [5, 10] and run.last("loss") == 99.0
    assert run.metric("heldout", "bits_per_byte") == (2.5, None)


def test_the_newest_evaluation_wins_task_by_task(tmp_path):
    folder = write_run(tmp_path / "later", "gqa")
    (folder / "eval" / "sub").mkdir(parents=True)
    later = {"date": 4e9, "results": {"mqar": {"accuracy,none": 0.5, "accuracy_stderr,none": 0.1}}, "run": {"jax": "x"}}
    (folder / "eval" / "sub" / "results_2.json").write_text(json.dumps(later))
    (run,) = runs.read([folder])
    assert run.metric("mqar", "accuracy") == (0.5, 0.1)
    assert run.metric("heldout", "bits_per_byte") is not None and run.described == {"jax": "x"}


def test_masks_are_what_the_model_declares():
    from configs import command_line

    model = command_line.load("configs/quickstart.py:attention=sliding").model
    model.attention.window, model.attention.sink_tokens = 8, 2
    (view,) = views(model, 40)
    t, s = np.arange(40)[:, None], np.arange(40)[None]
    np.testing.assert_array_equal(view.strength, (s <= t) & ((t - s < 8) | (s < 2)))
    model.per_layer = (("1", {"attention.window": 0}),)
    first, second = views(model, 40)
    assert (first.layers, second.layers) == ((0, 2, 3), (1,))
    np.testing.assert_array_equal(second.strength, s <= t)


def test_influence_is_causal_and_measured_where_there_is_no_mask():
    from configs import command_line

    model = command_line.load("configs/quickstart.py:attention=lightning").model
    view = views(model, 16)[0]
    assert view.measured and view.strength.shape == (16, 16)
    assert np.all(view.strength[np.triu_indices(16, 1)] == 0.0)
    np.testing.assert_allclose(view.strength.max(axis=1), 1.0)


def test_smoothing_keeps_constants_lines_and_gaps():
    np.testing.assert_allclose(plots.smoothed(np.full(200, 3.0)), 3.0)
    line = np.arange(400.0)
    np.testing.assert_allclose(plots.smoothed(line)[30:-30], line[30:-30])  # Centred: no lag.
    broken = np.full(200, 2.0)
    broken[50] = np.nan
    np.testing.assert_allclose(plots.smoothed(broken), 2.0)


def test_numbers_for_readers():
    assert [words.count(v) for v in (None, 12.3456, 999, 1234, 45_600_000, 2.5e12)] == [
        "–",
        "12.3",
        "999",
        "1.23 k",
        "45.6 M",
        "2.5 T",
    ]
    assert words.ranges((0, 1, 2, 5)) == "layers 0–2, 5" and words.ranges((3,)) == "layer 3"
    assert words.number(-0.5, signed=True) == "−0.500" and words.number(12345.6) == "12,346"
    assert words.short("x" * 100) == "x" * 59 + "…"
