"""What a check of a generation loop needs: models on which mistakes show, and what each pass of a model read."""

import torch
from torch.overrides import TorchFunctionMode


class Watch(TorchFunctionMode):
    """Notes whether a call of PyTorch inside a `with` block is one that `found(function, result)` looks for."""

    def __init__(self, found):
        super().__init__()
        self.found, self.called = found, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.called = self.called or self.found(func, result)
        return result


def generation_cases(model, token_ids, *, new_tokens: int) -> list:
    """Cases for `expect_function`: the learner's model and prompt, and two untrained models on random texts.

    Trained weights may write the same tokens in spite of a mistake. With these two models and texts they do not,
    whatever the learner's model writes.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, initializer_range=0.5, bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pairs = [(model, token_ids), *((LlamaForCausalLM(config).eval(), torch.randint(64, (1, 6))) for _ in range(2))]
    return [lambda m=m, ids=ids: {"model": m, "token_ids": ids.clone(), "new_tokens": new_tokens} for m, ids in pairs]


def watched(generate, *, model, token_ids, new_tokens: int) -> tuple[list, list[int], list[int], list[int]]:
    """The tokens, and of each pass of the model: positions read, positions that its cache held, first token read."""
    read, held, first = [], [], []

    def note(module, inputs, named):
        ids, cache = inputs[0] if inputs else named["input_ids"], named.get("past_key_values")
        read.append(ids.shape[1])
        held.append(cache.get_seq_length() if cache is not None else 0)
        first.append(ids[0, 0].item())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        tokens = generate(model, token_ids, new_tokens)
    finally:
        hook.remove()
    return tokens.tolist() if hasattr(tokens, "tolist") else tokens, read, held, first
