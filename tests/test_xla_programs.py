"""What is read from compiled programs, the matrix unit's arithmetic, and how JAX starts."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_here import devices  # noqa: F401
from tiny_models import tiny_model

from labutils.xla import hlo, llama, runtime, systolic
from labutils.xla.lazy import jax, jnp

HLO = """
%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %sum.1 = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %out = (s32[], f32[4]{0}) tuple(%i, %sum.1)
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%init), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %g = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), dimensions={0}
  ROOT %h = f32[8]{0} all-gather-done(%g)
}
"""


def test_operations_by_hand():
    counted = hlo.operations(HLO)
    assert counted["parameter"] == counted["while"] == counted["all-reduce"] == counted["tuple"] == 1
    assert sum(counted.values()) == 7
    assert hlo.collectives(HLO) == {"all-reduce": 1, "all-gather": 1}
    assert hlo.trip_counts(HLO) == [6]


def test_operations_of_a_real_program():
    text = jax.jit(lambda x, w: jnp.tanh(x @ w)).lower(jnp.ones((3, 4)), jnp.ones((4, 5))).compile().as_text()
    assert hlo.operations(text)["tanh"] == 1 and hlo.operations(text)["parameter"] >= 2


def test_cost_of_a_product_is_two_flop_a_multiplication():
    compiled = jax.jit(jnp.dot).lower(jnp.ones((32, 64)), jnp.ones((64, 16))).compile()
    assert hlo.cost_of(compiled).flop == 2 * 32 * 64 * 16


def test_cost_of_a_scan_counts_its_body_once_and_total_flop_repairs_it():
    costs = {}
    for unroll in (True, False):
        model = tiny_model("llama-gqa-tied")  # three layers
        shape = llama.shape_of(model.config, max_length=16)
        run = jax.jit(partial(llama.forward, shape=shape, unroll=unroll))
        lowered = run.lower(llama.params_of(model, shape), jnp.zeros(1, jnp.int32), llama.empty_cache(shape), 0)
        compiled = lowered.compile()
        costs[unroll] = hlo.cost_of(compiled)
        assert hlo.trip_counts(compiled.as_text()) == ([] if unroll else [3])
    assert 2.5 < costs[True].flop / costs[False].flop < 3.5
    assert costs[True].instructions > costs[False].instructions
    assert hlo.total_flop(10.0, 16.0, 1) == 10.0 and hlo.total_flop(10.0, 16.0, 2) == 16.0


def test_break_even_by_hand():
    assert hlo.break_even_tokens(2.0, 0.03, 0.01) == pytest.approx(100.0)
    assert hlo.break_even_tokens(2.0, 0.01, 0.02) == float("inf")


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_simulated_array_multiplies_and_idles_as_predicted(rows, inner, columns, size):
    numbers = np.random.default_rng(rows * 1000 + inner * 100 + columns * 10 + size)
    x, w = numbers.integers(-128, 128, (rows, inner)), numbers.integers(-128, 128, (inner, columns))
    run = systolic.simulate_array(x, w, size=size)
    assert (run.product == x @ w).all()
    assert run.cycles == systolic.array_cycles(rows, inner, columns, size=size)
    assert run.busy == rows * inner * columns
    assert run.utilisation(size) == pytest.approx(systolic.mxu_utilisation(rows, inner, columns, size=size))


def test_mxu_utilisation_grows_with_rows_and_stays_below_one():
    shares = [systolic.mxu_utilisation(rows, 256, 256) for rows in (1, 8, 128, 4096)]
    assert shares == sorted(shares) and shares[0] == pytest.approx(1 / 383) and 0.9 < shares[-1] < 1


@pytest.mark.parametrize(("element_bytes", "wanted"), [(4, (8, 384)), (2, (16, 384)), (1, (32, 384))])
def test_padded_shape_by_hand(element_bytes, wanted):
    assert systolic.padded_shape(1, 300, element_bytes) == wanted
    assert systolic.padded_shape(*wanted, element_bytes) == wanted


def test_tile_of_refuses_other_numbers():
    with pytest.raises(ValueError, match="element_bytes must be 1, 2 or 4; got 8"):
        systolic.tile_of(8)


def test_compilations_counts_what_is_new_only():
    double = jax.jit(lambda x: x * 2)
    with runtime.compilations("<lambda>") as seen:
        for length in (3, 4, 3, 4):
            double(jnp.ones(length))
    assert len(seen) == 2 and all(program.seconds > 0 for program in seen)
    with runtime.compilations("something else") as seen:
        double(jnp.ones(5))
    assert seen == []


def test_start_refuses_no_device():
    with pytest.raises(ValueError, match="devices must be at least 1; got 0"):
        runtime.start(devices=0)


def in_a_process_of_its_own(program, **environment):
    import os

    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


STARTED = """
import os
from labutils.xla import runtime
import jax
{before}
print(len(runtime.start(devices=3)), len(jax.devices()), os.environ.get("XLA_FLAGS", "none"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "jax.numpy.ones(3) + 1"], ids=["first", "after one device"])
def test_start_gives_the_devices_whatever_ran_before(before):
    assert in_a_process_of_its_own(STARTED.format(before=before)) == ["3", "3", "none"]


WITHOUT = """
import sys, pkgutil, importlib
sys.modules["jax"] = None
import labutils.xla
for module in pkgutil.iter_modules(labutils.xla.__path__):
    importlib.import_module(f"labutils.xla.{module.name}")
from labutils.xla import llama, runtime
try:
    llama.empty_cache(llama.Shape(1, 1, 1, 1, 1, 0.0))
except ModuleNotFoundError as error:
    print("jax>=0.9" in str(error), "\\n" not in str(error))
"""


@pytest.mark.slow
def test_without_jax_the_modules_import_and_say_in_a_sentence_what_is_missing():
    assert in_a_process_of_its_own(WITHOUT) == ["True", "True"]


@pytest.mark.slow
def test_importing_labutils_does_not_import_jax():
    program = """
import sys
import labutils.course.bench.xla, labutils.course.checks.ch07, labutils.xla.generate, labutils.xla.tpu_compiler
print("jax" in sys.modules)
"""
    assert in_a_process_of_its_own(program) == ["False"]
