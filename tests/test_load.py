"""Loading: the course's own models, local folders, and one clear sentence for everything that can go wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, HEADS, LLAMA, random_ids, tiny_model
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, MixtralConfig

from labutils.lab.models import lablm
from labutils.lab.models.checkpoint import CHECKSUMS, save_checkpoint, verify_checksums, written_aside
from labutils.lab.models.lablm import llama_config
from labutils.lab.models.load import LoadError, load_model
from labutils.lab.models.tokenizer import train_tokenizer
from labutils.lab.paths import DATA


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


FAMILIES = ["llama-gqa-tied", "llama-untied-bias", "gpt2", "qwen3", "mixtral"]
CONFIGS = CONFIGS | {"mixtral": lambda: MixtralConfig(**LLAMA, **HEADS, num_local_experts=4)}


@pytest.fixture(params=FAMILIES)
def whole(request, tmp_path, tokenizer, monkeypatch):
    """A model, the folder it lies in, and the names of its tensors there."""
    monkeypatch.setattr("tiny_models.CONFIGS", CONFIGS)
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    return model, tmp_path / "whole", load_file(tmp_path / "whole" / "model.safetensors")


def test_a_whole_checkpoint_loads_in_one_file_or_in_shards(whole, tmp_path, tokenizer):
    model, folder, _ = whole
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    for path in (folder, tmp_path / "shards"):
        torch.testing.assert_close(load_model(path).model(random_ids(7)).logits, model(random_ids(7)).logits)
    shard = next(iter(sorted((tmp_path / "shards").glob("model-*.safetensors"))))
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"must hold every tensor of the model; \S+ is missing|parts of \S+experts"):
        load_model(tmp_path / "shards")


def damaged(kind, tensors):
    """The file's tensors with one damage, and what the error must name."""
    name = [n for n in tensors if ".1." in n and "norm" not in n and "ln_" not in n][0]
    rest = {n: t for n, t in tensors.items() if n != name}
    fused = "experts" if "experts" in name else name.rsplit(".", 1)[0]
    return {
        "missing": (rest, fused),
        "renamed": (rest | {f"{name}_": tensors[name]}, fused),
        "prefixed": (
            {f"wrapped.{n}": t for n, t in tensors.items()},
            "must hold every tensor of the model; .*(embed|wte)",
        ),
        "extra": (
            tensors | {"value_head.weight": torch.ones(2)},
            "must belong to the model; value_head.weight does not",
        ),
        "reshaped": (rest | {name: torch.ones(7)}, fused),
        "lora": (
            {"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)},
            "lora_A.weight, which the model",
        ),
        "none": ({}, "must hold every tensor of the model"),
    }[kind]


@pytest.mark.parametrize("kind", ["missing", "renamed", "prefixed", "extra", "reshaped", "lora", "none"])
def test_nothing_random_is_loaded(whole, kind):
    _, folder, tensors = whole
    tensors, words = damaged(kind, tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=words):
        load_model(folder)


def test_a_model_without_its_head_loads_only_where_the_head_is_the_embedding(whole, tmp_path, tokenizer):
    model, _, _ = whole
    model.base_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    if model.config.tie_word_embeddings:
        torch.testing.assert_close(
            load_model(tmp_path / "base").model(random_ids(7)).logits, model(random_ids(7)).logits
        )
    else:
        with pytest.raises(LoadError, match="lm_head.weight is missing"):
            load_model(tmp_path / "base")


def test_an_adapter_is_no_model(checkpoint, tmp_path):
    (tmp_path / "adapter").mkdir()
    for folder in (tmp_path / "adapter", checkpoint):  # beside whole weights it would be left out without a word
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
        with pytest.raises(LoadError, match="must be whole; .* holds an adapter: merge it"):
            load_model(folder)


def test_saving_changes_neither_the_model_nor_the_folder_until_all_is_written(checkpoint, tokenizer, monkeypatch):
    model, before = load_model(checkpoint).model, {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    (checkpoint / "notes.json").write_text("mine", encoding="utf-8")

    def now():
        return {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "notes.json"}

    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="every number of model.norm.weight must be finite; 1 are not"):
        save_checkpoint(model, tokenizer, checkpoint)
    model.model.norm.weight.data[3] = 1.0
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", lambda *_: 1 / 0)
        for folder in (checkpoint, checkpoint.parent / "new"):
            with pytest.raises(ZeroDivisionError):
                save_checkpoint(model, tokenizer, folder)
    assert now() == before and not (checkpoint.parent / "new").exists()
    tokenizer = train_tokenizer(["def"], vocab_size=280, max_positions=64)
    tokenizer.chat_template = None
    save_checkpoint(model, tokenizer, checkpoint)
    assert model.dtype == torch.float32 and now().keys() == before.keys() - {"chat_template.jinja"}
    assert (checkpoint / "notes.json").read_text(encoding="utf-8") == "mine"
    assert load_model(checkpoint).tokenizer.chat_template is None


def test_a_kill_among_the_moves_leaves_a_folder_that_is_refused(checkpoint, tmp_path, monkeypatch):
    """Whether the folder is older or new: the checksums are there first."""
    moves = []

    def killed_at_the_second(source, target):
        moves.append(target)
        if len(moves) % 2 == 0:
            raise KeyboardInterrupt
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr("labutils.lab.models.checkpoint.os.replace", killed_at_the_second)
    for folder in (checkpoint, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt), written_aside(folder) as new:
            (new / "model.safetensors").write_bytes(b"other")
            (new / CHECKSUMS).write_text('{"model.safetensors": "00"}', encoding="utf-8")
        with pytest.raises(ValueError, match=r"model.safetensors"):
            verify_checksums(folder)


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
    monkeypatch.setattr("labutils.lab.models.load.AutoConfig.from_pretrained", _no_network)
    with pytest.raises(LoadError, match="go online, or load 'lablm'"):
        load_model("someone/some-model")


def test_unknown_hub_name(monkeypatch):
    monkeypatch.setattr("labutils.lab.models.load.AutoConfig.from_pretrained", _not_found)
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
