"""The ladder: fall-back rung by rung, plans, and every rung's logits held against float32 on the same weights."""

import copy
import re
import warnings
from dataclasses import replace

import pytest
import torch
from aside import triton_there
from shapes import unchecked
from tiny_models import LLAMAS, random_ids, tiny_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from labutils.acceleration import linears
from labutils.acceleration.graphs import Tape
from labutils.acceleration.interpreter import WITHOUT_TRITON
from labutils.acceleration.ladder import LADDER, NAMES, Device, Plan, climb, missing, tolerance
from labutils.acceleration.linears import Fp8Linear, Int4Linear, Int8Linear, fits_sparse, fuse_, takes_kernel
from labutils.acceleration.memory import DoesNotFit
from labutils.acceleration.triton_ops import relative_error
from labutils.course.bench.gpu import decode_step
from labutils.generation.decode import forward_logits, generate_cached
from labutils.lab.models import ladder
from labutils.lab.models.ladder import accelerate, build, check_equal, compiled_step

T4, A100 = Device("cuda", "T4", (7, 5)), Device("cuda", "A100", (8, 0))
L4, H200 = Device("cuda", "L4", (8, 9)), Device("cuda", "H200", (9, 0))
CPU = Device("cpu", "cpu", compiler="left out of this test")
SLOW_H200 = replace(H200, compiler="left out of this test")  # the GPU's plan, computed on a CPU
RUNGS = {rung.name: rung for rung in LADDER}


@pytest.mark.parametrize(
    ("device", "left_out"),
    [
        (T4, {"tf32", "bf16", "fp8", "2:4"}),
        (A100, {"fp8"}),
        (L4, set()),
        (H200, set()),
        (Device("cpu"), {"tf32", "fp16", "bf16", "cuda graph", "fp8", "2:4"}),
    ],
    ids=lambda value: value.name or value.kind if isinstance(value, Device) else "",
)
def test_climb_leaves_out_what_a_device_lacks(device, left_out):
    plan, skipped = climb("2:4", device)
    assert set(skipped) == left_out and all(name in reason for name, reason in skipped.items())
    assert plan.static and plan.compiled and plan.fused and plan.attention == "sdpa"


def test_climb_falls_back_to_the_format_below():
    assert climb("bf16", T4)[0].dtype == torch.float16 and climb("bf16", A100)[0].dtype == torch.bfloat16
    assert climb("fp8", A100)[0].weights == "int4" and climb("fp8", L4)[0].weights == "fp8"
    assert climb("2:4", Device("cpu"))[0].weights == "int4"


def test_climb_stops_at_the_rung():
    assert climb("fp32", H200) == (Plan(), {})
    assert not climb("sdpa", H200)[0].static


def test_climb_refuses_an_unknown_rung():
    with pytest.raises(ValueError, match="one of fp32, tf32.*got 'int3'"):
        climb("int3", T4)


def test_missing_names_the_reason():
    assert missing(RUNGS["fp8"], A100) == "fp8 needs compute capability 8.9, Ada, or newer; A100 has 8.0"
    assert "measure first" in missing(RUNGS["bf16"], CPU)
    assert "static cache" in missing(RUNGS["cuda graph"], H200, Plan())
    assert "left out of this test" in missing(RUNGS["compile"], CPU)


def test_tolerance_is_that_of_the_coarsest_number():
    assert tolerance(Plan()) == RUNGS["fp32"].tolerance
    assert tolerance(Plan(dtype=torch.bfloat16, attention="sdpa")) == RUNGS["bf16"].tolerance
    assert tolerance(Plan(weights="fp8", dtype=torch.float16)) == RUNGS["fp8"].tolerance
    assert tolerance(Plan(weights="int4", dtype=torch.float16)) == RUNGS["fp16"].tolerance < 1e-2  # not an int8 input's


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_gpus_int_rung_in_float32_must_be_exact_and_a_cpus_may_round_inputs(model, weights):
    ids, plan = random_ids(12), Plan(weights=weights)
    gpus, cpus = (check_equal(build(model, plan, on_cpu=on_cpu), ids, prompt=5) for on_cpu in (False, True))
    assert gpus.holds and gpus.tolerance == 1e-4 and cpus.holds and cpus.error > 1e-3


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa-tied")


@pytest.mark.parametrize("rung", ["fp32", "sdpa", "static cache", "fused", "int8", "int4"])
def test_cpu_rungs_equal_their_twin(model, rung):
    equality = check_equal(accelerate(model, rung, abilities=CPU, warn=False), random_ids(12, batch=2), prompt=5)
    assert equality.holds, str(equality)


@pytest.mark.parametrize("rung", [name for name in NAMES if name not in ("fp32", "compile", "2:4")])
def test_gpu_plans_equal_their_twin_when_computed_on_a_cpu(model, rung):
    accelerated = accelerate(model, rung, abilities=SLOW_H200, warn=False)
    equality = check_equal(accelerated, random_ids(12), prompt=5)
    assert rung not in accelerated.skipped and equality.holds, str(equality)


def test_steps_round_products_as_the_rung_says(model):
    seen = []
    accelerated = accelerate(model, "tf32", abilities=SLOW_H200, warn=False)
    accelerated.step = lambda *_: seen.append(torch.get_float32_matmul_precision()) or torch.zeros(1)
    ids = torch.zeros(1, dtype=torch.long)
    accelerated.stepper(None, ids)(ids)
    assert seen == ["high"] and torch.get_float32_matmul_precision() == "highest"


def test_compiled_steps_are_counted_apart_and_their_caches_have_few_lengths(model, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    first, second = compiled_step(), compiled_step()
    assert len({first.__code__.co_code, second.__code__.co_code}) == 1 and first.__code__ is not second.__code__
    accelerated = build(model, Plan(static=True, compiled=True))
    assert [accelerated.cache(positions=n).max_length for n in (1, 17, 64, 65)] == [64, 64, 64, 128]
    ids = random_ids(6)
    assert torch.equal(accelerated.generate(ids, 5), generate_cached(model, ids, 5))


def test_build_keeps_the_model_itself_as_twin_of_unrounded_weights(model):
    assert accelerate(model, "sdpa", abilities=CPU, warn=False).twin is model
    assert build(model, Plan(dtype=torch.bfloat16)).model.dtype == torch.bfloat16 and model.dtype == torch.float32


def test_check_equal_finds_a_wrong_layer(model):
    accelerated = accelerate(model, "static cache", abilities=CPU, warn=False)
    with torch.no_grad():
        accelerated.model.model.layers[1].mlp.down_proj.weight *= 1.01
    assert not check_equal(accelerated, random_ids(12), prompt=5).holds


def test_accelerate_leaves_the_model_alone(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate(model, "int4", abilities=SLOW_H200, warn=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("rung", ["fp32", "fused"])
def test_generate_gives_the_tokens_of_the_plain_loop(model, rung):
    ids = random_ids(6, batch=2)
    accelerated = accelerate(model, rung, abilities=CPU, warn=False)
    assert torch.equal(accelerated.generate(ids, 7), generate_cached(model, ids, 7))


def test_generate_through_a_recorded_step_gives_the_same_tokens(model):
    ids = random_ids(6)
    graphed = accelerate(model, "static cache", abilities=CPU, warn=False)
    graphed.plan = replace(graphed.plan, graphed=True)
    assert torch.equal(graphed.generate(ids, 7), generate_cached(model, ids, 7))


def test_generate_stops_and_pads(model):
    ids = random_ids(6)
    accelerated = accelerate(model, "sdpa", abilities=CPU, warn=False)
    token = int(accelerated.generate(ids, 1)[0, -1])
    assert accelerated.generate(ids, 5, stop=[token]).shape[1] == 7
    with pytest.raises(ValueError, match="at least 1; got 0"):
        accelerated.generate(ids, 0)


@pytest.mark.parametrize("every", [1, 4, 16])
def test_generate_asks_rarely_and_ends_where_all_have_stopped(model, monkeypatch, every):
    ids = random_ids(6, batch=3)
    accelerated = accelerate(model, "sdpa", abilities=CPU, warn=False)
    free = accelerated.generate(ids, 12)[:, 6:]
    stop = {int(text[place]) for text, place in zip(free, (5, 2, 3), strict=True)}
    monkeypatch.setattr(ladder, "ASK_EVERY", {"cpu": every})
    firsts = [next(i for i, token in enumerate(text.tolist()) if token in stop) for text in free]
    found = accelerated.generate(ids, 12, stop=stop)[:, 6:]
    assert found.shape[1] == 1 + max(firsts)
    for text, plain, end in zip(found, free, firsts, strict=True):
        assert torch.equal(text[: end + 1], plain[: end + 1]) and (text[end:] == plain[end]).all()


def test_a_timed_step_never_asks_the_device_for_a_number(model):
    accelerated = build(model, Plan(attention="sdpa", static=True, graphed=True))
    step = decode_step(accelerated, random_ids(6))
    first = step().clone()
    Tape.record(step)  # refuses what a CUDA graph or a queue would have to wait for
    assert torch.equal(step(), first)


def test_generate_out_of_memory_says_what_would_fit(model, monkeypatch):
    accelerated = accelerate(model, "sdpa", abilities=CPU, warn=False)

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    accelerated.step = no_memory
    with pytest.raises(DoesNotFit, match="Tried to allocate.*asked for.*GB of cache"):
        accelerated.generate(random_ids(4), 3)
    accelerated.step = accelerate(model, "fp32", abilities=CPU).step
    assert accelerated.generate(random_ids(4), 3).shape == (1, 7)


def test_accelerate_warns_once_with_every_reason(model):
    with pytest.warns(UserWarning, match="tf32.*bf16.*compile") as caught:
        accelerate(model, "compile", abilities=CPU)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model, "fp32", abilities=CPU)


@pytest.mark.slow
def test_compiled_rung_equals_its_twin_and_copies_no_cache(model):
    from torch._inductor.utils import run_and_get_code

    accelerated = accelerate(model, "compile", warn=False)
    if "compile" in accelerated.skipped:
        pytest.skip(accelerated.skipped["compile"])
    with unchecked():  # the checker's own Python would be compiled along
        equality, programs = run_and_get_code(check_equal, accelerated, random_ids(12), prompt=5)
    assert equality.holds, str(equality)
    sizes = re.findall(r"empty_strided_cpu\(\(([^)]*)\)", "".join(programs))
    cache = accelerated.cache(positions=12)
    assert "1, 32" in sizes and ", ".join(map(str, cache.keys[0].shape)) not in sizes, "a step copies its cache"


@pytest.mark.gpu
@pytest.mark.parametrize("rung", NAMES)
def test_rungs_equal_their_twin_on_a_gpu(rung):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = tiny_model("llama-gqa-tied")
    accelerated = accelerate(model, rung, device="cuda", warn=False)
    with unchecked():
        equality = check_equal(accelerated, random_ids(12), prompt=5)
    assert equality.holds, f"{equality}; left out: {accelerated.skipped}"


@pytest.mark.parametrize("name", LLAMAS)
def test_fuse_changes_no_logits(name):
    plain, fused = tiny_model(name), fuse_(tiny_model(name))
    ids = random_ids(9)
    assert relative_error(forward_logits(fused, ids), forward_logits(plain, ids)) < 1e-6
    linears = [m for m in fused.model.layers[0].modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 4  # of 7


def test_fused_parts_are_let_go_and_are_no_outputs_of_a_compiled_graph():
    fused, graphs = fuse_(tiny_model("llama-gqa-tied")), []
    forward_logits(fused, random_ids(9))
    assert all(not m.parts for m in fused.modules() if isinstance(m, linears._First))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)

    plain = Attention()
    joined, x = fuse_(copy.deepcopy(plain)), torch.randn(2, 4)
    with unchecked():
        y = torch.compile(joined, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)(x)
    torch._dynamo.reset()
    assert torch.allclose(y, plain(x), atol=1e-6)
    (graph,) = graphs
    (outputs,) = next(node for node in graph.graph.nodes if node.op == "output").args
    assert len(outputs) == 1


def test_fuse_refuses_a_model_without_such_layers():
    with pytest.raises(ValueError, match="q_proj"):
        fuse_(tiny_model("gpt2"))


def test_quantized_linears_by_hand():
    codes = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    int8 = Int8Linear(codes, torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.0]))
    assert int8(torch.tensor([[10.0, 1.0]])).tolist() == [[5.0, 68.0]]
    int4 = Int4Linear(codes, torch.tensor([[0.5, 1.0], [2.0, 3.0]]), None)
    assert int4.dequantize().tolist() == [[0.5, -2.0], [6.0, 12.0]]
    assert int4(torch.tensor([[10.0, 1.0]])).tolist() == [[3.0, 72.0]] and int4.codes.numel() == 2


def test_two_of_four_keeps_two_and_stores_what_fits(monkeypatch):
    stored = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: stored.append(tuple(w.shape)) or w)
    accelerated = build(tiny_model("llama-gqa-tied"), Plan(dtype=torch.bfloat16, weights="2:4"))
    weights = dict(accelerated.model.named_parameters())
    kept = [(w.unflatten(1, (-1, 4)) != 0).sum(dim=2) for n, w in weights.items() if n.endswith("proj.weight")]
    assert all((groups <= 2).all() for groups in kept) and (kept[0] == 2).all()
    assert stored == [tuple(w.shape) for n, w in weights.items() if n.endswith("proj.weight") and fits_sparse(w)]
    assert stored and len(stored) < len(kept)  # widths of 32 do not fit
    assert check_equal(accelerated, random_ids(12), prompt=5).holds


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3])
def test_quantized_linears_on_a_gpu_equal_their_formula(rows, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (40, 64), generator=generator).to(torch.int8)
    x = torch.randn(rows, 64, generator=generator)
    for layer in (Int8Linear(codes, torch.rand(40), None), Int4Linear(codes, torch.rand(40, 2), torch.ones(40))):
        exact = x.double() @ layer.dequantize().double().T + (0 if layer.bias is None else 1)
        x_there = x.to("cuda", dtype)
        assert takes_kernel(x_there, has_triton=layer.has_triton) == (rows == 1 and triton_there())
        assert relative_error(layer.to("cuda")(x_there).cpu(), exact) < (1e-5 if dtype == torch.float32 else 5e-3)


def one_row_layers():
    codes = torch.randint(-8, 8, (40, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    return Int8Linear(codes, torch.rand(40), None), Int4Linear(codes, torch.rand(40, 2), None)


@pytest.mark.skipif(not triton_there(), reason=WITHOUT_TRITON)
def test_compiled_quantized_linears_call_their_kernel_and_copy_no_weights(monkeypatch):
    """What a compiler sees of a layer: with the kernel no float tensor as large as the weights, without it one."""
    x = torch.randn(1, 64)
    for layer in one_row_layers():
        for has_kernel in (True, False):
            monkeypatch.setattr(linears, "takes_kernel", lambda x, has_triton, there=has_kernel: there)
            with unchecked():
                nodes = make_fx(layer)(x).graph.nodes
            sizes = [
                n.meta["val"].numel() for n in nodes if n.op == "call_function" and n.meta["val"].is_floating_point()
            ]
            assert (max(sizes) >= 40 * 64) == (not has_kernel)
            assert any("labutils" in str(node.target) for node in nodes) == has_kernel


@pytest.mark.skipif(not triton_there(), reason=WITHOUT_TRITON)
def test_quantized_linears_compile_into_one_graph_and_give_the_same(monkeypatch):
    monkeypatch.setattr(linears, "takes_kernel", lambda x, has_triton: True)
    x = torch.randn(1, 64)
    for layer in one_row_layers():
        with unchecked():
            y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        assert relative_error(y, x.double() @ layer.dequantize().double().T) < 1e-6
    torch._dynamo.reset()


def test_quantized_linears_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="-8 … 7; got -9"):
        Int4Linear(torch.tensor([[-9, 0]]), torch.ones(1, 1), None)
    with pytest.raises(ValueError, match="multiples of 16"):
        Fp8Linear(torch.ones(16, 8), None)
    for bad in (torch.inf, torch.nan):  # a cast would make a number of it, or NaN of a row
        with pytest.raises(ValueError, match="a weight must be finite to become fp8"):
            Fp8Linear(torch.ones(16, 16).index_fill(0, torch.tensor([3]), bad), None)


@pytest.mark.parametrize("rows", [1, 5])
def test_fp8_linear_is_close_to_its_weight(rows):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 64, generator=generator), torch.randn(rows, 64, generator=generator)
    layer = Fp8Linear(weight, torch.ones(32))
    assert relative_error(layer.dequantize(), weight) < 0.05  # a step of e4m3 is 1/8 of a number, rounded by half of it
    assert relative_error(layer(x), x.double() @ layer.dequantize().double().T + 1) < 0.05
