"""vLLM's engine on the CPU for `bench quantization`; it runs in vLLM's own environment, so nothing else is imported."""

import itertools
import time


class Vllm:
    """vLLM in float32, which is what its CPU build does with a float32 model.

    Args:
        folder: Of a Llama as transformers saves it; prompts are ids, so there is no tokenizer.
        positions: Room for one prompt and its new tokens.
    """

    def __init__(self, folder: str, *, positions: int = 1024) -> None:
        from vllm import LLM, SamplingParams

        options = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
        limits = {"max_model_len": positions, "max_num_batched_tokens": 2 * positions}
        self.engine = LLM(model=folder, skip_tokenizer_init=True, **options, **limits).llm_engine
        self.params, self.numbers = SamplingParams, itertools.count()

    def generate(self, prompts: list[list[int]], count: int) -> tuple[list[float], list[list[int]]]:
        """See `Llama.generate`: the beginning, and when each step's tokens were there."""
        params = self.params(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        names = [str(next(self.numbers)) for _ in prompts]
        made, ticks = dict.fromkeys(names, []), [time.perf_counter()]
        for name, prompt in zip(names, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while self.engine.has_unfinished_requests():
            made |= {output.request_id: list(output.outputs[0].token_ids) for output in self.engine.step()}
            while len(ticks) <= min(map(len, made.values())):
                ticks.append(time.perf_counter())
        return ticks, [made[name] for name in names]
