"""Claims of chapters 00 and 01 that a run on one CPU cannot show."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from labutils.course.checks import CheckFailed, ch00, ch01, ch01_costs
from labutils.course.source import read_chapter
from labutils.lab.models.load import load_model
from labutils.lab.plots.anatomy import draw_block

data_parallel = importlib.import_module("torch.nn.parallel.data_parallel")  # the package has a function of that name
SOURCE = Path(__file__).resolve().parents[1] / "notebooks" / "source"


def two_visible_gpus(monkeypatch):
    """PyTorch's wrapper as where two GPUs are visible: with one device it moves the module, with more it does not."""
    moved = []
    monkeypatch.setattr(data_parallel, "_get_available_device_type", lambda: "cuda")
    monkeypatch.setattr(data_parallel, "_get_all_device_indices", lambda: [0, 1])
    monkeypatch.setattr(data_parallel, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(data_parallel, "_check_balance", lambda device_ids: None)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append(str(device)) or self)

    def forward(self, *inputs):
        if str(self.src_device_obj) not in moved:
            raise RuntimeError(f"module must have its parameters and buffers on device {self.src_device_obj}")
        return self.module(*inputs)

    monkeypatch.setattr(nn.DataParallel, "forward", forward)


def test_the_article_s_loop_runs_where_two_gpus_are_visible(monkeypatch, capsys):
    cells = [cell.source for cell in read_chapter(SOURCE / "00_start_here.py").cells]
    loop = next(source for source in cells if "nn.DataParallel(" in source)
    two_visible_gpus(monkeypatch)
    answers = []
    exec(loop, {"torch": torch, "my_answers": SimpleNamespace(compare=answers.append)})
    assert answers == [4] and "wrappers around the network: 5" in capsys.readouterr().out


def test_the_stub_of_two_gpus_refuses_what_pytorch_refuses(monkeypatch):
    two_visible_gpus(monkeypatch)
    with pytest.raises(RuntimeError, match="on device cuda:0"):
        nn.DataParallel(nn.Linear(2, 2))(torch.ones(1, 2))


@pytest.mark.parametrize("shape", ["llama-gqa-tied", "llama-head-dim"])
def test_parameter_count_of_the_check_is_that_of_a_real_model(shape):
    model = tiny_model(shape)
    assert ch01_costs._parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_parameter_count_of_lablm():
    assert ch01_costs._parameters(load_model("lablm")[0].config) == 5_770_496


def test_linear_attention_equals_its_parallel_form():
    query, key, value = torch.randn(3, 9, 5, dtype=torch.float64)
    outputs, state = ch01._recurrent(query, key, value.double())
    assert torch.allclose(outputs, (query @ key.T).tril() @ value) and torch.allclose(state, key.T @ value)


def test_refuted_by_hand():
    """80 GB/s over 3.5 GB is 22.9 tokens/s, over 14 GB 5.7; 16 streams share a read: 91."""
    assert ch00._refuted(ch00.CLAIMS, 80e9) == ["7B, 16 bits", "70B, 4 bits"]
    assert ch00._refuted(ch00.CLAIMS, 1e12) == []


def test_library_attention_is_found_under_any_name():
    from torch.nn.functional import scaled_dot_product_attention as innocent

    with pytest.raises(CheckFailed, match="PyTorch's own attention"):
        ch01.causal_attention(lambda query, key, value: innocent(query, key, value, is_causal=True))


def test_the_block_shows_each_matrix_with_its_shape():
    config = tiny_model("llama-gqa-tied").config
    ax = draw_block(config).axes[0]
    words = [text.get_text() for text in ax.texts]
    hidden, inner = config.hidden_size, config.intermediate_size
    assert f"up {inner} × {hidden}" in words and f"down {hidden} × {inner}" in words
    assert "head:\nthe same table" in words and f"{config.num_hidden_layers} layers" in ax.get_title()
