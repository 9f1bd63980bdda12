"""Claims on an artificial one: what is computed from seeds, what survives, what is written, and what is refused."""

import dataclasses
import json
import math
import pathlib
import re
import statistics
import types
import xml.etree.ElementTree

import numpy as np
import pytest

import eval as program
from configs import lm
from configs.errors import UserError
from evaluation import claims
from evaluation.claims import checks as deciding
from evaluation.claims import page, record, running
from evaluation.claims.checks import Check, Rule, Verdict, at_least, at_most, equal, less, of, ordered
from evaluation.claims.contract import Claim, Table, number
from evaluation.contract import EvaluationError

ROOT = pathlib.Path(__file__).parent.parent
HOLDS, FAILS, NOISE = Verdict.HOLDS, Verdict.FAILS, Verdict.NOISE
BASE, BETTER, WORSE, LEVEL = (of("loss", form=form) for form in ("base", "better", "worse", "level"))


def measured(context):
    """Losses whose order is the same for every seed, but for one that is the base's with noise around it."""
    base = 4.0 + 0.5 * context.seed
    forms = {"better": -0.3, "worse": context.params["gap"], "level": 0.1 * (-1) ** context.seed}
    yield number("loss", base, "nats", form="base")
    for done, (form, shift) in enumerate(forms.items(), 1):
        yield number("loss", base + shift + 0.01 * context.seed, "nats", form=form)
        context.report("forms", done, len(forms))
    yield number("cache", 64, "bytes")


CLAIM = Claim(
    slug="artificial",
    title="An artificial claim",
    paper="2508.15881",
    says="better is better, and worse is worse.",
    setting="nothing is trained.",
    run=measured,
    defaults={"seeds": (0, 1, 2), "gap": 0.4, "sizes": (8, 16), "name": "x"},
    smoke={"seeds": (0, 1), "sizes": (8,)},
    tables=(Table("Loss after a while", "loss", rows="form"), ),
    checks=(
        Check("order", "Better is better than the base.", ordered(BETTER, BASE, WORSE), "paper, table 1"),
        Check("reverse", "The base is better than better.", less(BASE, BETTER), "ours"),
        Check("level", "Level is better than the base.", less(LEVEL, BASE), "ours", Rule.STANDARD_ERROR),
        Check("cache", "The cache is half.", at_most(of("cache"), 64), "paper, section 2", Rule.EXACT),
    ),
)  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of one's own to stand in, with the artificial claim known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "_registered", {"artificial": CLAIM})
    return tmp_path


def put(monkeypatch, **changes):
    """The artificial claim with other fields in the place of what was registered."""
    monkeypatch.setattr(claims, "_registered", {"artificial": dataclasses.replace(CLAIM, **changes)})


def untrained(config):
    raise AssertionError("this claim trains nothing")


def run(claim=CLAIM, given=None):
    parameters = claim.parameters(given or {})
    return running.measure(claim, parameters, untrained, running.Watch())[0]


# Verdicts.


@pytest.mark.parametrize(
    ("margins", "rule", "inclusive", "verdict"),
    [
        ([0.1, 0.2, 0.3], Rule.EVERY_SEED, False, HOLDS),
        ([-0.1, -0.2], Rule.EVERY_SEED, False, FAILS),
        ([0.1, -1e-9, 0.3], Rule.EVERY_SEED, False, NOISE),
        ([0.0, 0.0], Rule.EVERY_SEED, False, FAILS),  # Equal is not less.
        ([0.0, 0.0], Rule.EVERY_SEED, True, HOLDS),
        ([0.5], Rule.EVERY_SEED, False, NOISE),  # One seed shows no spread.
        ([-0.5], Rule.STANDARD_ERROR, False, NOISE),
        ([1.0, 2.0, -0.1, 1.5], Rule.STANDARD_ERROR, False, HOLDS),  # Mean 1.1, error 0.45.
        ([1.0, 2.0, -1.0, 1.5], Rule.STANDARD_ERROR, False, NOISE),  # Mean 0.875, error 0.66.
        ([-1.0, -2.0, 0.1, -1.5], Rule.STANDARD_ERROR, False, FAILS),
        ([0.2, 0.2], Rule.STANDARD_ERROR, False, HOLDS),
        ([0.0, 0.0], Rule.STANDARD_ERROR, False, FAILS),
        ([math.inf, 1.0], Rule.STANDARD_ERROR, False, HOLDS),  # Without a spread, the seeds decide.
        ([math.nan, 1.0], Rule.EVERY_SEED, False, NOISE),
        ([math.nan, math.nan], Rule.EVERY_SEED, True, FAILS),
        ([0.5], Rule.EXACT, False, HOLDS),
        ([0.5, -0.1], Rule.EXACT, False, FAILS),
        ([0.0], Rule.EXACT, True, HOLDS),
    ],
)
def test_verdicts_follow_from_margins(margins, rule, inclusive, verdict):
    assert deciding.decide(np.array(margins), rule, inclusive=inclusive) is verdict


def test_comparisons_are_paired_by_seed():
    values = deciding.Measured({of("a"): [1.0, 5.0], of("b"): [2.0, 7.0]})

    def margins(comparison):
        return list(comparison.margins(values))

    assert margins(less(of("a"), of("b"))) == [1.0, 2.0]
    assert margins(less(of("a"), of("b"), times=1.5, by=0.25)) == [0.25, -0.75]
    assert [margins(each) for each in ordered(of("a"), of("b"), of("a"))] == [[1.0, 2.0], [-1.0, -2.0]]
    assert margins(at_most(of("a"), 3)) == [2.0, -2.0] and margins(at_least(of("a"), 3)) == [-2.0, 2.0]
    assert margins(equal(of("a"), of("b"), relative=0.5)) == [0.0, 1.5]
    assert of("a", x=1, y="p") == of("a", y="p", x="1") and str(of("a", y="p", x=1)) == "a (1, p)"
    with pytest.raises(ValueError, match=r"unknown measurement 'a \(pac\)'"):
        values[of("a", transform="pac")]


def test_equal_seeds_have_no_spread():
    assert deciding.standard_error(np.array([0.1, 0.1, 0.1])) == 0.0  # Their mean is not 0.1 to the last bit.
    assert deciding.standard_error(np.array([1.0])) is None
    assert math.isnan(deciding.standard_error(np.array([math.inf, math.inf])))
    assert deciding.standard_error(np.array([1.0, 2.0, 4.0])) == pytest.approx(statistics.stdev([1, 2, 4]) / 3**0.5)


def test_a_check_comes_to_the_worst_of_its_comparisons():
    values = deciding.Measured({of("a"): [1.0, 2.0], of("b"): [2.0, 3.0], of("c"): [3.0, 1.0]})

    def verdict(*keys):
        return Check("n", "s", ordered(*keys), "ours").decide(values).verdict

    a, b, c = of("a"), of("b"), of("c")
    assert [verdict(a, b), verdict(a, b, c), verdict(b, c, a), verdict(b, a, c)] == [HOLDS, NOISE, NOISE, FAILS]
    assert Verdict.together([]) is HOLDS


# Measuring.


def test_every_number_has_its_seeds_and_their_spread(place):
    found = run()
    values = [4.0 + 0.5 * seed + 0.4 + 0.01 * seed for seed in range(3)]
    (worse,) = (each for each in found.measurements if each.keys.get("form") == "worse")
    assert worse.values == pytest.approx(values) and worse.unit == "nats"
    assert worse.mean == pytest.approx(statistics.mean(values))
    assert worse.deviation == pytest.approx(statistics.stdev(values))
    assert [check.verdict for check in found.checks] == [HOLDS, FAILS, NOISE, HOLDS] and found.verdict is FAILS
    finding = found.checks[0].findings[0]
    assert finding.margins == pytest.approx([0.3, 0.29, 0.28]) and finding.agreeing == 3
    assert finding.stderr == pytest.approx(0.01 / math.sqrt(3))
    assert found.seeds == (0, 1, 2) and found.changed == {} and found.command == "python eval.py --claim=artificial"
    assert found.environment["platform"] == "cpu" and found.seconds >= 0
    assert [each.name for each in found.others()] == ["cache"]


def test_what_is_kept_survives_an_interruption(place, monkeypatch, capsys):
    calls = []

    def stopping(context):
        calls.append(context.seed)
        if context.seed == 2 and len(calls) == 3:
            raise KeyboardInterrupt
        return measured(context)

    put(monkeypatch, run=stopping)
    assert program.main(["--claim=artificial"]) == 130
    assert "the same command goes on" in capsys.readouterr().out and not (place / "claims").exists()
    assert len(list((place / "runs").rglob("seed-*.json"))) == 2
    assert program.main(["--claim=artificial"]) == 0
    assert calls == [0, 1, 2, 2]
    said = capsys.readouterr().out
    assert "seed 0: kept from" in said and "forms: 3/3" in said
    resumed = record.load(place / "claims/artificial.json")
    assert program.main(["--claim=artificial"]) == 0  # Once recorded nothing is kept: this measures again.
    assert calls == [0, 1, 2, 2, 0, 1, 2]
    assert resumed.measurements == record.load(place / "claims/artificial.json").measurements  # As without a stop.


def test_what_is_kept_belongs_to_its_circumstances(place):
    def seeds_measured(claim, **given):
        calls = []

        def counting(context):
            calls.append(context.seed)
            return measured(context)

        run(dataclasses.replace(claim, run=counting), given)
        return calls

    assert seeds_measured(CLAIM) == [0, 1, 2] and seeds_measured(CLAIM) == []
    assert seeds_measured(CLAIM, seeds="2:3") == [3]
    assert seeds_measured(CLAIM, gap="0.5") == [0, 1, 2]
    assert seeds_measured(dataclasses.replace(CLAIM, version=2)) == [0, 1, 2]
    (kept, *_) = sorted((place / "runs").rglob("seed-3.json"))
    kept.write_text(kept.read_text()[:-9])
    with pytest.raises(UserError, match=r"seed-3.json is damaged .*delete it"):
        seeds_measured(CLAIM, seeds="3")


def test_seeds_must_agree_on_what_is_measured(place):
    with pytest.raises(ValueError, match="seeds 0 and 1 differ in .*'more'"):
        run(dataclasses.replace(CLAIM, run=lambda c: [number("a", 1), *([number("more", 1)] if c.seed else [])]))
    with pytest.raises(ValueError, match="two numbers"):
        run(dataclasses.replace(CLAIM, version=2, run=lambda c: [number("a", 1, x=1), number("a", 2, x="1")]))
    with pytest.raises(ValueError, match="no numbers"):
        run(dataclasses.replace(CLAIM, version=3, run=lambda c: []))


def test_equal_configs_are_trained_once(place, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # As on a terminal.
    folders, watch = [], running.Watch()

    def train(config):
        assert watch.bar is None  # Or it would be drawn over that of the run.
        folder = pathlib.Path(config.run_dir)
        folders.append((config.seed, folder.is_dir()))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "finished.json").write_text("{}")
        return types.SimpleNamespace(config=config, step=config.train.steps)

    def training(context):
        config = lm.get_config("smoke")
        first = context.train(config)
        context.report("waiting", 1, 2)
        assert watch.bar is not None
        config.run_dir = "elsewhere"  # That is not for a claim to say.
        again = context.train(config)
        config.train.steps += 1
        longer = context.train(config)
        assert first.config.run_dir == again.config.run_dir != longer.config.run_dir
        assert first.config.run_dir.startswith("runs/claims/trained/lm-gqa-smoke-")
        yield number("steps", longer.step)

    claim = dataclasses.replace(CLAIM, run=training, checks=(), tables=())
    found, _ = running.measure(claim, claim.parameters({}), train, watch)
    assert folders == [(seed, again) for seed in range(3) for again in (False, True, False)]
    assert [run["reused"] for run in found.runs] == [False, True, False] * 3
    assert found.runs[2]["step"] == 21 and len({run["folder"] for run in found.runs}) == 6


# Records.


def test_a_record_comes_back_as_it_was(place):
    values = {0: math.inf, 1: math.nan, 2: -math.inf}
    odd = dataclasses.replace(
        CLAIM,
        run=lambda c: [number("x", values[c.seed], a="|"), number("y", 1 / (c.seed + 3))],
        checks=(Check("x", "s", less(of("y"), of("x", a="|")), "ours"),),
        tables=(Table("both", ("x", "y"), rows="a"),),
    )
    for claim in (CLAIM, odd):
        found = run(claim, {"sizes": "1:2:3"})
        path = found.write(place / "claims")
        text = path.read_text()
        assert "NaN" not in text and "Infinity" not in text and json.loads(text)["schema"] == record.SCHEMA
        back = record.load(path)
        assert repr(back) == repr(found)  # As texts, because no NaN equals another.
        assert back.parameters["sizes"] == (1, 2, 3) and back.changed == {"sizes": (8, 16)}
        assert page.render([back]) == page.render([found])
        (place / "runs").rename(place / f"runs-{len(list(place.iterdir()))}")
    assert json.loads(text)["measurements"][0]["values"] == ["inf", "nan", "-inf"]


def test_json_has_what_a_reader_would_compute(place):
    content = run().json()
    loss = content["measurements"][0]
    assert loss["mean"] == pytest.approx(4.5) and loss["deviation"] == pytest.approx(0.5) and loss["n"] == 3
    assert content["verdict"] == "does not hold" and content["checks"][2]["verdict"] == "within noise"
    assert content["checks"][1]["findings"][0]["mean"] == pytest.approx(-0.29)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("seeds"), "is damaged (KeyError('seeds'))"),
        (lambda content: content.update(schema=99), "has schema 99"),
        (lambda content: content["checks"][0]["findings"][0].update(verdict="maybe"), "is damaged"),
        (lambda content: content.pop("schema"), "is no record of a claim"),
    ],
)
def test_damaged_records_are_named(place, damage, message):
    content = json.loads(run().write(place).read_text())
    damage(content)
    path = place / "artificial.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        record.load(path)
    assert message in str(error.value) and str(path) in str(error.value)


# The page and the picture.


def test_the_page_is_that_of_the_records():
    """docs/claims.md, and in every record words, tables and verdicts as its claim now has them."""
    found = record.load_all(ROOT / "claims")
    assert (ROOT / "docs/claims.md").read_text(encoding="utf-8") == page.render(found), "run: python eval.py claims"
    for each in found:
        assert record.judged(each, claims.get(each.slug)).json() == each.json(), "run: python eval.py claims"
        assert (ROOT / f"claims/{each.slug}.svg").is_file()


def test_a_page_without_records_says_so():
    assert "No claim has been measured yet" in page.render([])


def test_the_page_shows_what_does_not_hold(place):
    found = run()
    other = dataclasses.replace(found, slug="also", title="Also | this", measurements=found.measurements[:1], checks=())
    text = page.render([found, other])
    assert text == page.render([other, found])
    link = "[2508.15881](https://arxiv.org/abs/2508.15881)"
    assert f"| [An artificial claim](#artificial) | {link} | **does not hold** | 2 hold, 1 does not hold, " in text
    assert "[Also \\| this](#also)" in text and '<a id="also"></a>' in text
    assert "**Verdict: does not hold** (2 hold, 1 does not hold, 1 within noise)." in text
    assert "- **does not hold**: reverse. The base is better than better. (ours; all seeds must agree" in text
    assert "  - `loss (base) < loss (better)`: does not hold, by −0.2900 ± 0.0058, 0 of 3 seeds" in text
    assert "| form | loss |\n| --- | ---: |\n| base | 4.500 ± 0.500 nats |" in text
    assert "| cache | 64 bytes |" in text
    assert "![An artificial claim](../claims/artificial.svg)" in text and f"    {found.command}\n" in text
    assert "Seeds 0, 1, 2; on cpu" in text and f"; {found.date[:10]}, 0 seconds" in text
    runs = ({"reused": True}, {"reused": False})
    assert "Seeds 0, 1, 2, 2 runs trained (1 of them before); on" in page.render(
        [dataclasses.replace(found, runs=runs)]
    )
    assert "not the claim's own" not in text
    assert "own parameters, which are sizes = 8, 16." in page.render([run(given={"sizes": "4"})])


def test_tables_have_rows_and_columns(place):
    grid = Table("Grid", "loss", rows="row", columns="column", where={"g": "2"}, decimals=1)
    several = Table("Measures", ("loss", "cache"), rows="row")

    def numbers(context):
        for row, column, g in (("a", "x", 2), ("a", "y", 2), ("b", "y", 2), ("b", "x", 4)):
            yield number("loss", 1 + context.seed, row=row, column=column, g=g)
        yield number("loss", 7, row="c")
        yield number("cache", 1e9, row="c")
        yield number("cache", -1e-9, row="d")

    found = run(dataclasses.replace(CLAIM, run=numbers, tables=(grid, several), checks=()))
    text = page.render([found])
    assert "| row | x | y |\n| --- | ---: | ---: |\n| a | 2.0 ± 1.0 | 2.0 ± 1.0 |\n| b | – | 2.0 ± 1.0 |" in text
    assert "| row | loss | cache |\n| --- | ---: | ---: |\n| c | 7 | 1,000,000,000 |\n| d | – | −1e-09 |" in text
    assert [str(each.key) for each in found.others()] == ["loss (x, 4, b)"]
    with pytest.raises(ValueError, match="one measure only"):
        Table("t", ("a", "b"), rows="r", columns="c")


@pytest.mark.parametrize("tables", [CLAIM.tables, (), (Table("t", "loss", rows="all", columns="form"),)])
def test_a_picture_stands_alone(place, monkeypatch, tables):
    def infinite(context):
        yield from (dataclasses.replace(each, keys={**each.keys, "all": "1"}) for each in measured(context))
        yield number("loss", math.inf, all=1, form="lost")

    put(monkeypatch, tables=tables, run=infinite if tables and tables[0].rows == "all" else measured, checks=())
    assert program.main(["--claim=artificial", "--output=out"]) == 0
    text = (place / "out/artificial.svg").read_text()
    root = xml.etree.ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and float(root.get("width")) > 300 and "base" in text
    used, known = set(re.findall(r"var\(--([\w-]+)\)", text)), set(re.findall(r"--([\w-]+): #", text))
    assert used <= known and "series-1" in used


# The command line.


def test_what_is_recorded_and_what_is_not(place, capsys):
    assert program.main(["--claim=artificial", "--smoke"]) == 0
    assert not (place / "claims").exists() and not (place / "docs").exists()
    smoked = record.load(place / "runs/claims/artificial.json")
    assert smoked.seeds == (0, 1) and "not recorded" in capsys.readouterr().out
    assert smoked.command == "python eval.py --claim=artificial --params=artificial.seeds=0:1,artificial.sizes=8"
    assert program.main(["--claim=artificial"]) == 0
    assert (place / "docs/claims.md").read_text() == page.render([record.load(place / "claims/artificial.json")])
    assert program.main(["--claim=artificial", "--output=claims", "--params=artificial.gap=0.2"]) == 0
    assert record.load(place / "claims/artificial.json").parameters["gap"] == 0.2
    assert "own parameters, which are gap = 0.4" in (place / "docs/claims.md").read_text()
    repeated = record.load(place / "claims/artificial.json").command.split()[2:]
    assert program.main([*repeated, "--output=again"]) == 0
    again = record.load(place / "again/artificial.json")
    assert again.measurements == record.load(place / "claims/artificial.json").measurements


def test_claims_are_judged_again_without_measuring(place, monkeypatch, capsys):
    assert program.main(["--claim=artificial"]) == 0
    before = record.load(place / "claims/artificial.json")
    picture, text = place / "claims/artificial.svg", (place / "docs/claims.md").read_text()
    assert program.main(["claims", "--check"]) == 0
    put(monkeypatch, run=untrained, checks=CLAIM.checks[:1], title="Another title")
    picture.unlink()
    capsys.readouterr()
    assert program.main(["claims", "--check"]) == 1
    assert (place / "docs/claims.md").read_text() == text and not picture.exists()
    assert "not up to date: claims/artificial.json" in capsys.readouterr().out
    assert program.main(["claims"]) == 0
    assert "artificial: holds; it was recorded as: does not hold" in capsys.readouterr().out
    after = record.load(place / "claims/artificial.json")
    assert after.verdict is HOLDS and after.measurements == before.measurements and after.date == before.date
    assert "Another title" in (place / "docs/claims.md").read_text() and picture.exists()
    capsys.readouterr()
    assert program.main(["claims", "--check", "--draw"]) == 0 and capsys.readouterr().out == ""
    assert program.main(["claims", "--draw"]) == 0 and capsys.readouterr().out == "written: claims/artificial.svg\n"
    put(monkeypatch, version=2)  # What was measured is of the version before.
    assert program.main(["claims", "--check"]) == 1 and "measure it again" in capsys.readouterr().out
    monkeypatch.setattr(claims, "_registered", {})
    with pytest.raises(UserError, match="a claim that there is not"):
        program.main(["claims"])


def test_claims_are_listed(place, capsys):
    assert program.main(["ls", "claims"]) == 0
    said = capsys.readouterr().out
    assert "artificial" in said and "An artificial claim (arXiv 2508.15881): not measured" in said and "gap=0.4" in said
    program.main(["--claim=artificial"])
    capsys.readouterr()
    program.main(["ls", "claims"])
    assert "(arXiv 2508.15881): does not hold" in capsys.readouterr().out


def test_a_run_that_is_stopped_stops_the_claim(place, monkeypatch, capsys):
    import signal

    import train

    def training(context):
        yield number("step", context.train(lm.get_config("smoke")).step)

    stops = [signal.SIGTERM, signal.SIGINT]
    monkeypatch.setattr(train, "run", lambda config: train.RunResult(pathlib.Path(config.run_dir), {}, stops.pop()))
    put(monkeypatch, run=training)
    assert [program.main(["--claim=artificial"]) for _ in range(2)] == [130, 0]
    assert "the same command goes on" in capsys.readouterr().out and not (place / "claims").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--claim=artifical"], "unknown claim 'artifical': did you mean artificial?"),
        (["--claim=artificial", "--run=runs/x"], "--claim and --run exclude each other"),
        (["--claim=artificial", "--model=gqa"], "--claim and --model exclude each other"),
        (["--claim=artificial", "--limit=3"], "--claim and --limit exclude each other"),
        (["--claim=artificial", "--seed=3"], "give --params=artificial.seeds"),
        (["--model=gqa", "--smoke"], "--smoke needs a --claim"),
        (
            ["--claim=artificial", "--params=artificial.gab=3"],
            "unknown parameter of claim artificial 'gab': did you mean",
        ),
        (["--claim=artificial", "--params=heldout.gap=3"], "parameters were given for 'heldout'"),
        (["--claim=artificial", "--params=gap=3"], "name before a dot"),
        (["--claim=artificial", "--params=artificial.gap=wide"], "artificial.gap must be a number"),
        (["--claim=artificial", "--params=artificial.seeds=0:x"], "artificial.seeds must be a whole number"),
        (["--claim=artificial", "--params=artificial.seeds=1:1"], "seeds must be distinct"),
        (["--clam=artificial"], "did you mean --claim"),
        (["ls", "claim"], "invalid choice"),
        (["claims", "--chekc"], "did you mean --check"),
    ],
)
def test_mistakes_are_user_errors_of_one_line(place, argv, message):
    with pytest.raises(UserError) as error:
        program.main(argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(place.iterdir())  # Nothing was begun.


def test_flags_from_a_file_exclude_a_claim_too(place):
    (place / "flags.yaml").write_text("run: runs/x\n")
    with pytest.raises(UserError, match="--claim and --run exclude each other"):
        program.main(["--claim=artificial", "--config=flags.yaml"])


def test_claims_say_what_they_are():
    for changes, message in (
        ({"slug": "Not_A_Slug"}, "lower-case words"),
        ({"defaults": {"steps": 3}}, "no seeds"),
        ({"smoke": {"stepz": 3}}, "'stepz', which has no default"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CLAIM, **changes)
    with pytest.raises(EvaluationError, match="unknown claim 'nothing-like-it'"):
        claims.get("nothing-like-it")


def test_every_claim_of_a_paper_can_be_loaded():
    for slug in claims.names():
        claim = claims.get(slug)
        assert claim.slug == slug and claim.checks and all(check.source for check in claim.checks)
        assert claim.parameters({}, smoke=True)["seeds"]
