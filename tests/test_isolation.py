"""After each exercise the kernel is as the course left it: names, builtins, modules' functions, settings."""

import builtins
import math
import os
import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from hand_ins import INTRUSIONS

from labutils.course.isolation import Isolation

EXERCISE, CHECK = "# EXERCISE speed\n", "# CHECK speed\n"
SOLUTION = "# EXERCISE speed\nspeed = 2"


def run(source, is_solution=True, solution=SOLUTION, **names):
    """The namespace after an exercise with this answer, and its check."""
    names = {"__name__": "__main__", "__builtins__": builtins, "In": [EXERCISE + source], "lesson": 1, **names}
    isolation = Isolation(names, {"speed": solution}, is_solution)
    isolation.before_cell(EXERCISE + source)
    exec(source, names)
    isolation.after_cell(EXERCISE + source)  # the answer must still stand when its check runs
    assert is_solution or "speed" in names
    isolation.after_cell(CHECK)
    return names


@pytest.mark.parametrize("kind", INTRUSIONS)
def test_isolation_takes_every_intrusion_back(kind):
    before = (round, max, math.floor, os.getcwd(), list(sys.path), list(warnings.filters))
    names = run(INTRUSIONS[kind])
    assert names.keys() == {"__name__", "__builtins__", "In", "lesson", "speed"}
    assert (names["__name__"], names["__builtins__"], names["lesson"]) == ("__main__", builtins, 1)
    now = (builtins.round, builtins.max, math.floor, os.getcwd(), sys.path, warnings.filters)
    assert now == before and not hasattr(builtins, "helper")


@pytest.mark.parametrize("name", ["min", "round", "int", "torch", "np", "lesson", "helper"])
def test_isolation_gives_each_name_back_or_takes_it_away(name):
    names = run(f"{name} = 17\ndel lesson", torch=torch, np=np)
    assert names.get(name) is {"torch": torch, "np": np, "lesson": 1}.get(name)
    assert names["lesson"] == 1


def test_isolation_puts_the_courses_answer_where_the_learners_was():
    assert run("speed = 3\nhelper = 4")["speed"] == 2
    assert run("speed = 3", solution="# EXERCISE speed\nspeed = 1 / 0").get("speed") is None  # and raises nothing


def test_isolation_in_a_kit_keeps_what_the_exercise_is_to_define():
    blank = "# EXERCISE speed\ndef speed():\n    raise NotImplementedError('Exercise 1.1: speed')"
    names = run("def speed():\n    return 3\nhelper = 4", is_solution=False, solution=blank)
    assert names["speed"]() == 3 and "helper" not in names


def test_isolation_keeps_what_the_check_cell_itself_binds():
    names = {"__name__": "__main__", "In": []}
    isolation, check = (
        Isolation(names, {"speed": SOLUTION}, True),
        CHECK + "from math import floor as ch09\nchecked = 1",
    )
    isolation.before_cell(SOLUTION)
    exec("speed = helper = ch09 = checked = 5", names)
    isolation.after_cell(SOLUTION)
    exec(check, names)
    isolation.after_cell(check)
    assert (names["ch09"], names["checked"], names["speed"]) == (math.floor, 1, 2) and "helper" not in names


def test_isolation_hides_the_answer_from_the_hints_of_later_checks():
    assert run("min = 0")["In"] == [""]


def test_isolation_puts_settings_and_random_numbers_back():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    first = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    names = run(
        "torch.set_default_dtype(torch.float64)\ntorch.set_default_device('meta')\ntorch.set_grad_enabled(False)\n"
        "torch.manual_seed(4), random.seed(4), np.random.seed(4), np.seterr(all='raise')\n"
        "sys.setrecursionlimit(500)\nos.environ['LABUTILS_ODD'] = '1'\ndel os.environ['PATH']\n"
        "torch.Tensor.sum = torch.nn.Module.train = None\ntorch.nn.functional.softmax = lambda x: x\n"
        "sys.modules['math'] = None",
        **{"torch": torch, "random": random, "np": np, "sys": sys, "os": os},
    )
    assert torch.equal(torch.rand(2), first[0]) and (random.random(), np.random.rand()) == first[1:]
    assert torch.get_default_dtype() == torch.float32 and torch.get_default_device().type == "cpu"
    assert torch.is_grad_enabled() and np.geterr()["over"] == "warn" and sys.getrecursionlimit() > 500
    assert "LABUTILS_ODD" not in os.environ and "PATH" in os.environ and sys.modules["math"] is math
    assert torch.ones(3).sum().item() == 3 and torch.nn.Linear(1, 1).train() and callable(names["np"].sum)
    assert torch.nn.functional.softmax(torch.zeros(2), dim=0).tolist() == [0.5, 0.5]


def test_isolation_leaves_cells_of_the_lesson_alone():
    names = {"In": []}
    isolation = Isolation(names, {}, True)
    for source in ("a = 1", "# CHECK\n", "def f(", "# EXERCISE\n"):
        isolation.before_cell(source)
        names["a"] = 1
        isolation.after_cell(source)
    assert names == {"In": [], "a": 1}


def test_isolation_survives_modules_of_any_kind(monkeypatch):
    for name, odd in {"odd_none": None, "odd_slots": types.SimpleNamespace(f=len), "odd_object": object()}.items():
        monkeypatch.setitem(sys.modules, name, odd)
    assert run("min = 0")["speed"] == 2
