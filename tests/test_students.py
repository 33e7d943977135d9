"""The experiment's program: runs end in one line each, resume, and the table claims only what its interval allows."""

import json
from dataclasses import replace

import pytest
import torch
from test_training import TEXTS

from labutils.lab.models import students, training
from labutils.lab.models.checkpoint import sha256
from labutils.lab.models.lablm import SHAPES
from labutils.lab.models.load import load_model


@pytest.fixture(scope="module")
def teacher():
    return load_model("lablm")


@pytest.mark.parametrize("name", students.SIZES)
def test_first_student_has_the_size_and_speaks_better_than_chance(name, teacher):
    size = students.SIZES[name]
    student = students.first_student(teacher, size)
    assert student.config.num_hidden_layers == len(size.layers)
    assert student.model.layers[0].mlp.up_proj.weight.shape == (size.neurons, 256)
    torch.testing.assert_close(student.model.embed_tokens.weight, teacher.model.model.embed_tokens.weight)
    ids = teacher.tokenizer("import os\nimport sys\n\n\ndef main():\n    return 0\n", return_tensors="pt").input_ids
    with torch.no_grad():
        assert student(input_ids=ids, labels=ids).loss < 12
    share = 1 - student.num_parameters() / teacher.model.num_parameters()
    assert share == pytest.approx({"tiny": 0.68, "small": 0.61, "half": 0.41}[name], abs=0.01)


@pytest.mark.parametrize("loss", students.LOSSES)
def test_run_point_trains_writes_one_line_and_resumes(loss, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "sources", lambda *, packages: TEXTS | {"stdlib": TEXTS["stdlib"] * 9})
    monkeypatch.setattr(training.Run, "validation_bits_per_byte", lambda self, limit_bytes: 1.0)
    monkeypatch.setattr(
        students, "scores", lambda loaded, items: {"documents": [[8.0, 2]], "right": {}, "items": items}
    )
    small = replace(students.Point("tiny", loss, 0, 2).plan, code_tokens=128, dialogues=2, sequence_length=32)
    small = replace(small, long_sequence_length=64)
    monkeypatch.setattr(students.Point, "plan", property(lambda self: small))
    point, lines = students.Point("tiny", loss, 0, 2), []
    settings = {"state": tmp_path, "results": tmp_path / "r.jsonl", "log": lines.append}
    row = students.run_point(point, **settings)
    assert [r["step"] for r in row["curve"]] == [1, 2] and row["parameters"] == 1_836_288
    again = students.run_point(point, **settings)
    assert again["curve"] == row["curve"]
    assert [json.loads(line)["size"] for line in (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert students.remaining([point], tmp_path / "r.jsonl") == []
    assert (tmp_path / point.name / "checkpoint" / "model.safetensors").is_file()


def test_sibling_run_makes_the_shipped_shape_and_learns_from_the_teacher_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "sources", lambda *, packages: TEXTS)
    run, loss_of = students.sibling_run(4, mixed_precision=False, state_dir=tmp_path)
    shape, config = SHAPES["lablm-small"], run.model.config
    assert (config.num_hidden_layers, config.intermediate_size) == (shape.layers, shape.intermediate_size)
    assert {run.plan.shape_of_code(step) for step in range(4)} == {(4, 1024)}
    ids = run.tokenizer("import os\n", return_tensors="pt").input_ids
    teacher = load_model("lablm").model
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits[0, :-1] for model in (run.model, teacher))
        expected = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
        torch.testing.assert_close(loss_of(ids, ids), expected)


def rows_with(gaps):
    return [
        {"size": "tiny", "loss": loss, "seed": seed, "steps": 1, "documents": [[2.0 + (gap if loss == "KD" else 0), 1]]}
        for seed, gap in enumerate(gaps)
        for loss in ("CE", "KD")
    ]


def test_effect_by_hand():
    (effect,) = students.effects(rows_with([-0.1, -0.2, -0.3]))
    half = 4.303 * 0.1 / 3**0.5
    assert effect.difference == pytest.approx(-0.2) and effect.ce == 2.0 and effect.kd == pytest.approx(1.8)
    assert effect.interval == pytest.approx((-0.2 - half, -0.2 + half)) and not effect.is_shown
    assert students.effects(rows_with([-0.19, -0.2, -0.21]))[0].is_shown


def test_an_effect_that_another_text_would_turn_round_is_not_shown():
    """Every seed says −0.1 on average, but the documents say −0.5 and +0.3: seeds alone would have been sure."""
    rows = rows_with([-0.1, -0.1001, -0.0999])
    for row in rows:
        help_ = [-0.5, 0.3] * 3 if row["loss"] == "KD" else [0.0] * 6
        row["documents"] = [[2.0 + gap + 1e-4 * row["seed"], 1] for gap in help_]
    (effect,) = students.effects(rows)
    assert effect.difference == pytest.approx(-0.1) and effect.interval[1] > 0 and not effect.is_shown
    assert -0.5 <= effect.interval[0] < -0.3


@pytest.mark.parametrize(
    "interval, verdict", [((-0.2, -0.1), "KD beats CE"), ((0.1, 0.2), "CE beats KD"), ((-0.1, 0.1), "not told apart")]
)
def test_effect_claims_what_its_interval_shows(interval, verdict):
    line = str(students.Effect("tiny", 2.0, 1.9, interval, 3))
    assert line.startswith("tiny   CE 2.0000  KD 1.9000  -0.1000 [") and line.endswith(f"3 seeds: {verdict}")


def test_effects_of_another_score():
    rows = rows_with([-0.1, -0.2])
    for row, right in zip(rows, [50, 60, 50, 70], strict=True):  # CE and KD of two seeds
        row |= {"right": {"intent": right, "answer": 100}, "items": 100}
    (effect,) = students.effects(rows, students.wrong_share)
    assert (effect.ce, effect.kd) == (pytest.approx(0.25), pytest.approx(0.175))


def test_committed_runs_are_the_whole_experiment():
    runs = students.longest_runs()
    assert students.remaining(students.points(seeds=3, steps=runs[0]["steps"])) == []
    assert [e.seeds for e in students.effects(runs)] == [3, 3, 3]


def test_effects_need_two_seeds():
    with pytest.raises(ValueError, match="at least 2 seeds with both losses; got 1 for tiny"):
        students.effects(rows_with([-0.1]))


def test_effects_refuse_runs_of_different_length():
    rows = rows_with([-0.1, -0.2])
    with pytest.raises(ValueError, match=r"runs of one length may be compared; got \[1, 9\] steps"):
        students.effects(rows + [row | {"steps": 9} for row in rows])


def test_mean_interval_needs_a_known_number_of_seeds():
    with pytest.raises(ValueError, match="needs 2 to 5 values; got 1"):
        students.mean_interval([1.0])


def test_longest_runs_leave_out_what_was_shorter_or_is_not_finished(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(vars(students.Point("tiny", "CE", 0, 2))) + "\n", encoding="utf-8")
    assert students.longest_runs(path) == []
    rows = [vars(p) for steps in (2, 9) for p in students.points(seeds=2, steps=steps)] + [
        vars(p) for p in students.points(seeds=1, steps=30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert students.longest_runs(path) == rows[12:24]


def test_validation_curves_take_the_validated_steps_of_each_loss():
    def row(loss, end):
        return {"loss": loss, "curve": [{"step": 1}, {"step": 2, "validation_bits_per_byte": end}]}

    lines, steps = students.validation_curves([row("CE", 2.0), row("KD", 1.5), row("CE", 2.5)])
    assert steps == [2] and lines == {"CE": [[2.0], [2.5]], "KD": [[1.5]]}


def test_references_are_measured_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(students, "load_model", asked.append)
    monkeypatch.setattr(students, "scores", lambda loaded, items: {"items": items})
    for _ in range(2):
        assert students.reference_scores(tmp_path / "r.json", items=7)["lablm-small"]["items"] == 7
    assert asked == ["lablm", "lablm-small"]


def test_committed_references_are_the_shipped_models_on_the_students_items():
    for name, scores in students.reference_scores().items():
        assert scores["weights"] == sha256(students.DATA / name / "model.safetensors"), f"delete {students.REFERENCES}"
        assert set(scores["right"]) == set(students.service.TASKS) and scores["items"] == 100
        assert all(0 <= right <= 100 for right in scores["right"].values()) and len(scores["documents"]) == 17


def test_shipped_sibling_has_its_shape_and_its_record():
    shape = SHAPES["lablm-small"]
    config = load_model("lablm-small").model.config
    assert (config.num_hidden_layers, config.intermediate_size) == (shape.layers, shape.intermediate_size)
    assert (shape.layers, shape.intermediate_size) == (len(students.SIBLING.layers), students.SIBLING.neurons)
    lines = (students.DATA / "results" / "lablm_small_choices.jsonl").read_text(encoding="utf-8").splitlines()
    ends = {(*c["layers"], c["neurons"]): c["curve"][-1]["validation_bits_per_byte"] for c in map(json.loads, lines)}
    assert min(ends, key=ends.get) == (*students.SIBLING.layers, students.SIBLING.neurons)


def test_points_finish_a_seed_before_the_next():
    chosen = students.points(seeds=2, steps=9)
    assert len(chosen) == 12 and [p.seed for p in chosen] == [0] * 6 + [1] * 6
    assert len({p.name for p in chosen}) == 12
