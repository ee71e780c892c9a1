"""DeepSpeed's ZeRO-3.

Weights that live in shards over the processes and are whole only while something computes with them.

Training brings an engine that gathers them, by `transformers.Trainer`. The passes and the evaluation need one
as well, without an optimiser and for as long as they last; single weights are gathered one layer at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: What a pass or an evaluation needs to know of a ZeRO JSON; the rest is about optimisers and batches.
KEPT = ("bf16", "communication_data_type", "comms_logger")
ONLY_TRAINING = ("offload_optimizer",)
#: What the optimisers of ZeRO-3, and of ZeRO-1, 2 and bf16, hang on a parameter to find their fp32 copy of
#: it.
LINKS = ("_z3_optimizer", "_hp_mapping")


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a shard; its own shape is then empty."""
    return hasattr(parameter, "ds_id")


def number_count(parameter: nn.Parameter) -> int:
    """How many numbers a parameter has; a shard's own shape is empty."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def gathered(parameters: Iterable[Tensor | None], write: bool = False) -> Iterator[None]:
    """Make parameters whole in every process while the block runs; every process has to come along.

    Args:
        parameters: plain ones and None are left as they are.
        write: whether what the first process wrote into them stays.
    """
    shards = [p for p in parameters if p is not None and is_partitioned(p)]
    if not shards:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shards, modifier_rank=0 if write else None):
        yield


def trained_values(parameter: nn.Parameter) -> Tensor:
    """A parameter in fp32, whole and copied: the optimiser's own copy where DeepSpeed keeps one.

    Every process has to come along.
    """
    if any(hasattr(parameter, link) for link in LINKS):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().float().clone()
    with gathered([parameter]):
        return parameter.detach().float().clone()


def forget_engine(parameters: Iterable[nn.Parameter]) -> None:
    """Release parameters from an engine that has ended.

    Its fp32 copies are no longer theirs and would be kept alive.
    """
    for parameter in parameters:
        for link in LINKS:
            vars(parameter).pop(link, None)


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load a model unpartitioned, whatever the run's ZeRO stage; `Zero.adopt` does it afterwards."""
    from transformers.integrations import deepspeed as integration

    held = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = held


def keep_scalars_whole(model: nn.Module) -> None:
    """Turn frozen parameters without dimensions (CLIP's temperature) into buffers.

    DeepSpeed moves parameters as bytes, which a scalar can't be, and in shards one process alone would hold
    it.
    """
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.dim() == 0 and not p.requires_grad:
                delattr(module, name)
                module.register_buffer(name, p.detach())


class Zero:
    """What a run's ZeRO JSON means outside of training.

    Without a JSON, everything here does nothing; below stage 3, little.

    Args:
        config: the JSON's content without `auto` precisions, or None; see `RunConfig.deepspeed`.
    """

    def __init__(self, config: Mapping[str, Any] | None):
        self.used = bool(config)
        section = (config or {}).get("zero_optimization", {})
        self.partitions = int(section.get("stage", 0)) == 3
        if not self.partitions:
            return
        from transformers.integrations import HfDeepSpeedConfig

        concrete = {
            key: value for key, value in section.items() if value != "auto" and key not in ONLY_TRAINING
        }
        self.config = {key: config[key] for key in KEPT if key in config}
        self.config |= {"zero_optimization": concrete, "train_micro_batch_size_per_gpu": 1}
        # transformers asks this object, for as long as it lives, whether to load in shards and to generate in
        # step.
        self._asked = HfDeepSpeedConfig(self._copy())

    def _copy(self) -> dict[str, Any]:
        # DeepSpeed writes into what it is given.
        return json.loads(json.dumps(self.config))

    def adopt(self, model: nn.Module) -> None:
        """Make a frozen model one that DeepSpeed can work with.

        With ZeRO-3, split what was loaded whole over the processes.
        """
        if self.used:
            keep_scalars_whole(model)
        if not self.partitions or all(map(is_partitioned, model.parameters())):
            return
        import deepspeed

        deepspeed.zero.Init(module=model, config_dict_or_path=self._copy())
        for module in model.modules():
            # CLIP's embeddings ask their table of positions how long it is before they use it; a shard would
            # say 0.
            if isinstance(table := getattr(module, "position_embedding", None), nn.Embedding):
                deepspeed.zero.register_external_parameter(module, table.weight)

    @contextmanager
    def engaged(self, module: nn.Module) -> Iterator[None]:
        """Let a module compute.

        Its forward and backward passes gather what they need, in all processes alike.
        """
        if not self.partitions:
            yield
            return
        import deepspeed
        from transformers.integrations.deepspeed import set_hf_deepspeed_config

        # A Trainer since then has put its own in this place.
        set_hf_deepspeed_config(self._asked)
        engine, *_ = deepspeed.initialize(model=module, config=self._copy())
        try:
            yield
        finally:
            engine.destroy()
