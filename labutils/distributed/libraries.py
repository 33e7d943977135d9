"""The same two ways by the libraries: torch's `parallelize_module` and transformers' `DistributedConfig`."""

from pathlib import Path

import torch.distributed as dist
from torch import nn

from labutils.distributed.collectives import rank_device


def parallelize_by_torch_(model: nn.Module) -> nn.Module:
    """Cuts a Llama-like model over all ranks with torch's own plan styles, in place: the weights become DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    layer = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    layer |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    layer |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    plan = {f"model.layers.*.{name}": style for name, style in layer.items()}
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    mesh = init_device_mesh(rank_device().type, (dist.get_world_size(),))
    return parallelize_module(model.to(rank_device()), mesh, plan)


def load_by_transformers(folder: str | Path, **sizes: int) -> nn.Module:
    """Loads a checkpoint with transformers' own parallelism: `tp_size=2` or `pp_size=2`, over all ranks.

    Every rank reads only what it needs of the file.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    plan = {"tp_plan": "auto"} if "tp_size" in sizes else {}
    config = DistributedConfig(**plan, **sizes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", distributed_config=config).eval()
