"""Loading: the course's own models, local folders, and one clear sentence for everything that can go wrong."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from labutils.models import lablm
from labutils.models.checkpoint import save_checkpoint, verify_checksums
from labutils.models.lablm import llama_config
from labutils.models.load import LoadError, load_model
from labutils.models.tokenizer import train_tokenizer
from labutils.paths import DATA


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n" * 5], vocab_size=280, max_positions=64)


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    from transformers import LlamaForCausalLM

    shape = lablm.Shape(
        layers=1, hidden_size=32, intermediate_size=64, heads=2, kv_heads=1, head_dim=16, vocab_size=280
    )
    save_checkpoint(LlamaForCausalLM(llama_config(shape, tokenizer)), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_local_folder_loads_in_the_type_asked_for(checkpoint):
    model, tokenizer = load_model(checkpoint)
    assert model.dtype == torch.float32 and not model.training and tokenizer.eos_token == "<|end|>"
    assert load_model(checkpoint, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_another_architecture_loads_too(tmp_path, tokenizer):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=280)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path).model.config.model_type == "gpt2"


def test_missing_folder_and_config(tmp_path):
    with pytest.raises(LoadError, match="a local model must be a folder; .*nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(LoadError, match="must hold config.json"):
        load_model(tmp_path)


def test_missing_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="must hold model.safetensors.*it is missing"):
        load_model(checkpoint)
    (checkpoint / "checksums.json").unlink()
    with pytest.raises(LoadError, match="could not be loaded"):
        load_model(checkpoint)


def test_one_flipped_bit_is_noticed(checkpoint):
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(LoadError, match="model.safetensors in .* must have SHA-256 .* it differs"):
        load_model(checkpoint)


def test_damaged_weights_without_checksums(checkpoint):
    (checkpoint / "checksums.json").unlink()
    (checkpoint / "model.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(LoadError, match="they are damaged"):
        load_model(checkpoint)


def test_wrong_architecture(tmp_path, tokenizer):
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=280
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    settings = json.loads((tmp_path / "bert" / "config.json").read_text(encoding="utf-8"))
    settings["model_type"] = "vit"
    (tmp_path / "bert" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(LoadError, match="must be a causal language model; .* is of type 'vit'"):
        load_model(tmp_path / "bert")


def test_unreachable_hub_names_the_offline_way(monkeypatch):
    monkeypatch.setattr("labutils.models.load.AutoConfig.from_pretrained", _no_network)
    with pytest.raises(LoadError, match="go online, or load 'lablm'"):
        load_model("someone/some-model")


def test_unknown_hub_name(monkeypatch):
    monkeypatch.setattr("labutils.models.load.AutoConfig.from_pretrained", _not_found)
    with pytest.raises(LoadError, match="no usable model 'someone/misspelt'"):
        load_model("someone/misspelt")


def _no_network(*args, **kwargs):
    raise OSError("We couldn't connect to the hub to load the files, and couldn't find them in the cached files.")


def _not_found(*args, **kwargs):
    raise OSError("someone/misspelt is not a local folder and is not a valid model identifier")


@pytest.mark.parametrize("name", ["lablm", "lablm-small"])
def test_shipped_models_load_and_are_whole(name):
    verify_checksums(DATA / name)
    model, tokenizer = load_model(name)
    assert model.num_parameters() < 14e6 and tokenizer.chat_template
    assert all(m.in_features % 256 == 0 for m in model.modules() if isinstance(m, torch.nn.Linear))


def test_shipped_models_share_a_tokenizer_and_stay_small():
    own, small = (load_model(name) for name in lablm.SHAPES)
    assert own.tokenizer.get_vocab() == small.tokenizer.get_vocab()
    assert 5e6 <= own.model.num_parameters() <= 14e6 and 1e6 <= small.model.num_parameters() <= 4e6
    weights = sum(path.stat().st_size for path in DATA.rglob("*.safetensors"))
    assert weights <= 32e6
