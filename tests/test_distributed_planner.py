import pytest
from tiny_models import tiny_model

from labutils.distributed.collectives import Link
from labutils.distributed.planner import Devices, Load, ModelShape, coordinates, plan, step_s

SHAPE = ModelShape(weight_bytes=800, layers=4, hidden=10, heads=8, kv_heads=2, head_dim=5, value_bytes=2)
QUIET = Devices(count=4, memory_bytes=10_000, read_bytes_per_s=100, link=Link())


def test_step_time_by_hand():
    """800 bytes of weights and 2 x 3 cached positions of 2*4*2*5*2 = 160 bytes, read at 100 bytes/s."""
    assert SHAPE.kv_bytes_per_token == 160
    assert step_s(SHAPE, QUIET, Load(2, 3), tensor=1, pipeline=1) == pytest.approx((800 + 960) / 100)
    assert step_s(SHAPE, QUIET, Load(2, 3), tensor=2, pipeline=2) == pytest.approx((800 + 960) / 2 / 100)
    slow = Devices(4, 10_000, 100, Link(latency_s=1.0, bytes_per_s=40))
    # nine all-reduces of 2*10*2 = 40 bytes: 2 steps of 1 s + 20/40 s; a hop of 40 bytes and 16 bytes back
    assert step_s(SHAPE, slow, Load(2, 3), tensor=2, pipeline=1) == pytest.approx(8.8 + 9 * 2 * 1.5)
    assert step_s(SHAPE, slow, Load(2, 3), tensor=1, pipeline=2) == pytest.approx(17.6 + 2.0 + 1.4)
    at_once = Devices(4, 10_000, 100, Link(latency_s=1.0, bytes_per_s=40), one_shot=True)
    assert step_s(SHAPE, at_once, Load(2, 3), tensor=2, pipeline=1) == pytest.approx(8.8 + 9 * 2.0)  # 1 s + 40/40 s


def test_plan_uses_all_devices_and_cuts_no_head():
    plans = plan(SHAPE, QUIET, Load(8, 3))
    assert all(p.data * p.tensor * p.pipeline == 4 for p in plans)
    assert {(p.data, p.tensor, p.pipeline) for p in plans} == {
        (4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4)
    }  # fmt: skip
    odd = ModelShape(800, layers=4, hidden=10, heads=9, kv_heads=3, head_dim=5)
    assert {p.tensor for p in plan(odd, QUIET, Load(8, 3))} == {1}


def test_plan_prefers_what_fits_and_the_pipeline_on_a_slow_link():
    small = Devices(4, memory_bytes=500, read_bytes_per_s=100, link=Link())
    first = plan(SHAPE, small, Load(1, 1))[0]
    assert first.fits and first.data == 1 and first.tensor == 4
    slow = Devices(4, memory_bytes=500, read_bytes_per_s=1e6, link=Link(latency_s=1.0))
    best = plan(SHAPE, slow, Load(1, 1))[0]
    assert best.fits and (best.tensor, best.pipeline) != (4, 1) and best.pipeline >= 2
    assert "DOES NOT FIT" in str(plan(SHAPE, Devices(4, 1, 100, Link()), Load(1, 1))[0])


def test_shape_of_a_model_counts_its_bytes():
    model = tiny_model("llama-gqa-tied")
    shape = ModelShape.of(model)
    assert shape.weight_bytes == 4 * model.num_parameters() and (shape.layers, shape.kv_heads) == (3, 2)
    assert shape.kv_bytes_per_token == 2 * 3 * 2 * 8 * 4


def test_coordinates_number_the_mesh():
    seen = {coordinates(rank, tensor=2, pipeline=3) for rank in range(12)}
    assert len(seen) == 12 and max(seen) == (1, 2, 1)
    assert coordinates(1, tensor=2, pipeline=3)[2] == 1  # the next rank is a tensor neighbour


def test_plan_refuses_no_device():
    with pytest.raises(ValueError, match="a plan needs devices and requests; got 0 and 1"):
        plan(SHAPE, Devices(0, 1, 1, Link()), Load(1, 1))
