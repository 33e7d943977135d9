"""Architecture search: mutation and crossover by hand, equal cost, and a table that is measured once."""

import json
import random
from statistics import fmean

import pytest

from labutils.capstone.inherit import Shape, shape_of
from labutils.capstone.search import (
    COMPARED,
    METHODS,
    RESULTS,
    SPACE,
    TIME_BUDGET,
    Reader,
    Table,
    crossover,
    evolutionary_search,
    evolve_step,
    one_step_away,
    random_search,
)
from labutils.lab.models.load import load_model

TOY = [tuple(range(5))] * 5
BEST = (3, 1, 4, 2, 0)


def toy_loss(candidate):
    return sum((a - b) ** 2 for a, b in zip(candidate, BEST, strict=True))


def toy_fits(candidate):
    return sum(candidate) <= 12  # the optimum costs 10


class First:
    """Randomness that always takes the first."""

    def choice(self, values):
        return values[0]

    def choices(self, values, k):
        return list(values[:1]) * k

    def random(self):
        return 0.0


def test_one_step_away_by_hand():
    assert one_step_away((1, 8, 5), [(1, 2, 4), (2, 4, 8), (5,)]) == [(2, 8, 5), (1, 4, 5)]
    assert one_step_away((2, 4, 5), [(1, 2, 4), (2, 4, 8), (5,)]) == [(1, 4, 5), (4, 4, 5), (2, 2, 5), (2, 8, 5)]


def test_a_mutant_differs_in_one_axis_by_one_place():
    rng = random.Random(0)
    for _ in range(200):
        parent = tuple(rng.choice(values) for values in TOY)
        for child in one_step_away(parent, TOY):
            assert sum(abs(a - b) for a, b in zip(parent, child, strict=True)) == 1


def test_crossover_takes_every_axis_from_a_parent():
    children = {crossover((1, 2, 3), (4, 5, 6), random.Random(seed)) for seed in range(100)}
    assert children == {(a, b, c) for a in (1, 4) for b in (2, 5) for c in (3, 6)}


def test_evolve_step_by_hand():
    found = {(4, 4, 4, 4, 4): 31.0, (3, 1, 4, 2, 1): 1.0}
    assert evolve_step(found, TOY, First()) == (2, 1, 4, 2, 1)  # the best one's first neighbour


def test_only_survivors_have_children():
    found = {(i, 0, 0, 0, 0): float(i) for i in range(5)}
    near = set(one_step_away((0, 0, 0, 0, 0), TOY)) | set(one_step_away((1, 0, 0, 0, 0), TOY))
    assert {evolve_step(found, TOY, random.Random(seed), survivors=2) for seed in range(300)} <= near


@pytest.mark.parametrize("method", METHODS.values())
def test_searches_keep_to_budget_and_price(method):
    trained, asked = [], []
    for seed in range(5):
        trained.clear()
        found = method(
            TOY,
            fits=lambda c: asked.append(c) or toy_fits(c),
            loss_of=lambda c: trained.append(c) or toy_loss(c),
            evaluations=20,
            seed=seed,
        )
        assert list(found) == trained and len(set(trained)) == 20  # each paid for once
        assert all(map(toy_fits, trained)) and all(map(toy_fits, found))
        again = method(TOY, fits=toy_fits, loss_of=toy_loss, evaluations=20, seed=seed)
        assert list(again.items()) == list(found.items())


@pytest.mark.parametrize("method", METHODS.values())
def test_a_search_ends_when_nothing_else_fits(method):
    found = method([(0, 1), (0, 1)], fits=lambda c: sum(c) < 2, loss_of=sum, evaluations=9, seed=1)
    assert sorted(found) == [(0, 0), (0, 1), (1, 0)]
    assert method([(0, 1)], fits=lambda c: False, loss_of=sum, evaluations=2, seed=0) == {}


def test_both_searches_begin_with_the_same_candidates():
    for seed in range(5):
        one, other = (
            list(method(TOY, fits=toy_fits, loss_of=toy_loss, evaluations=12, seed=seed))
            for method in (random_search, evolutionary_search)
        )
        assert one[:4] == other[:4] and one != other


def needed(method, seed, most=100):
    found = method(TOY, fits=toy_fits, loss_of=toy_loss, evaluations=most, seed=seed)
    return 1 + list(found.values()).index(0) if 0 in found.values() else most


def test_evolution_needs_fewer_evaluations_where_neighbours_are_alike():
    ours, chance = ([needed(method, seed) for seed in range(8)] for method in (evolutionary_search, random_search))
    assert fmean(ours) < 0.5 * fmean(chance)
    assert max(ours) < 100  # always there


@pytest.mark.slow
def test_optuna_agrees_on_the_order_of_evolution_and_chance(library_aside):
    library_aside("colorlog")
    optuna = library_aside("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def objective(trial):
        candidate = tuple(trial.suggest_int(f"axis{i}", 0, 4) for i in range(5))
        return toy_loss(candidate) if toy_fits(candidate) else 100.0

    def best_after(sampler, trials=60):
        study = optuna.create_study(sampler=sampler)
        study.optimize(objective, n_trials=trials)
        return study.best_value

    def ours(method, seed):
        return min(method(TOY, fits=toy_fits, loss_of=toy_loss, evaluations=60, seed=seed).values())

    seeds = range(8)
    genetic = fmean(best_after(optuna.samplers.NSGAIISampler(population_size=10, seed=s)) for s in seeds)
    drawn = fmean(best_after(optuna.samplers.RandomSampler(seed=s)) for s in seeds)
    assert genetic < drawn
    assert fmean(ours(evolutionary_search, s) for s in seeds) <= genetic
    assert fmean(ours(evolutionary_search, s) for s in seeds) < fmean(ours(random_search, s) for s in seeds)


def fake_row(shape):
    row = {"shape": list(shape), "ratio": [shape.layers / 3, 0, 1]}
    return row | ({"bits_per_byte": 1 / shape.channels} if shape.layers <= 3 else {})


def test_table_measures_each_shape_once_and_resumes(tmp_path):
    asked = []
    path = tmp_path / "table.jsonl"
    first = Table(path, measure=lambda shape: asked.append(shape) or fake_row(shape))
    found = first.search("evolution", 0, evaluations=8)
    assert len(asked) == len(set(asked)) == len(path.read_text().splitlines())
    assert all(shape[0] <= 3 for shape in found) and all(
        size in values for size, values in zip(asked[0], SPACE, strict=True)
    )
    assert Table(path, measure=None).search("evolution", 0, evaluations=8) == found  # nothing is measured again


def test_table_keeps_its_rows_when_a_measurement_fails(tmp_path):
    def measure(shape):
        if shape.layers == 6:
            raise TimeoutError
        return fake_row(shape)

    path = tmp_path / "table.jsonl"
    table = Table(path, measure=measure)
    table.row(Shape(1, 128, 128, 1, 1024))
    with pytest.raises(TimeoutError):
        table.row(Shape(6, 128, 128, 1, 1024))
    assert [json.loads(line)["shape"][0] for line in path.read_text().splitlines()] == [1]


def test_reader_adds_up_an_answer_in_each_language():
    reader = Reader(load_model("lablm-small"))
    assert reader.answer_s({"en": [1.0, 2.0], "zh": [3.0, 3.0], "token": [0.5, 0.0]}) == [
        (1 + 3 + reader.tokens * 0.5) / 2,
        2.5,
    ]
    for call in reader.parts().values():
        call()
        call()
    assert reader.decoder.length == reader.prompts[1].shape[1]  # a token is taken back: each costs the same


def test_stored_rows_are_of_the_space_and_follow_the_budget():
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert all(size in values for size, values in zip(row["shape"], SPACE, strict=True))
        assert ("bits_per_byte" in row) == (row["ratio"][0] <= TIME_BUDGET)
        assert row["ratio"][1] <= row["ratio"][0] <= row["ratio"][2]
    assert len({tuple(row["shape"]) for row in rows}) == len(rows)


def test_stored_comparison_has_its_control():
    rows = [json.loads(line) for line in COMPARED.read_text(encoding="utf-8").splitlines()]
    for steps in {row["steps"] for row in rows} - {None}:
        named = {row["name"]: row for row in rows if row["steps"] == steps}
        assert named["LabLM-small's shape"]["shape"] == list(shape_of("lablm-small")) and len(named) == 3
        assert len({len(row["bits"]) for row in named.values()} | {len(row["right"]) for row in named.values()}) == 1
