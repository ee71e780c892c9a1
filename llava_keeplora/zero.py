"""DeepSpeed's ZeRO-3: weights that live in shards over the processes and are whole only while something computes with them.

Training brings an engine that gathers them, by `transformers.Trainer`. The passes and the evaluation need one as well, without
an optimiser and for as long as they last; single weights are gathered one layer at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

#: What a pass or an evaluation needs to know of a ZeRO JSON; the rest is about optimisers and batches.
KEPT = ("bf16", "communication_data_type", "comms_logger")
ONLY_TRAINING = ("offload_optimizer",)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a shard; its own shape is then empty."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[nn.Parameter | None], write: bool = False) -> Iterator[None]:
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


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Load a model unpartitioned, whatever the run's ZeRO stage; `Zero.partition` does it afterwards."""
    from transformers.integrations import deepspeed as integration

    held = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = held


@contextmanager
def scalars_as_vectors(model: nn.Module) -> Iterator[None]:
    """DeepSpeed moves parameters as bytes, which one without dimensions (CLIP's temperature) can't be; a shard stays a vector."""
    scalars = [p for p in model.parameters() if p.dim() == 0]
    try:
        for p in scalars:
            p.data = p.data.reshape(1)
        yield
    finally:
        for p in scalars:
            if not is_partitioned(p):
                p.data = p.data.reshape(())


class Zero:
    """What a run's ZeRO JSON means outside of training. Without a JSON, and below stage 3, everything here does nothing.

    Args:
        config: the JSON's content without `auto` precisions, or None; see `RunConfig.deepspeed`.
    """

    def __init__(self, config: Mapping[str, Any] | None):
        section = (config or {}).get("zero_optimization", {})
        self.partitions = int(section.get("stage", 0)) == 3
        if not self.partitions:
            return
        from transformers.integrations import HfDeepSpeedConfig

        concrete = {key: value for key, value in section.items() if value != "auto" and key not in ONLY_TRAINING}
        self.config = {key: config[key] for key in KEPT if key in config}
        self.config |= {"zero_optimization": concrete, "train_micro_batch_size_per_gpu": 1}
        # transformers asks this object, for as long as it lives, whether to load in shards and to generate in step.
        self._asked = HfDeepSpeedConfig(self._copy())

    def _copy(self) -> dict[str, Any]:
        # DeepSpeed writes into what it is given.
        return json.loads(json.dumps(self.config))

    def partition(self, model: nn.Module) -> None:
        """Split what was loaded whole over the processes."""
        if not self.partitions or all(map(is_partitioned, model.parameters())):
            return
        import deepspeed

        with scalars_as_vectors(model):
            deepspeed.zero.Init(module=model, config_dict_or_path=self._copy())

    @contextmanager
    def engaged(self, module: nn.Module) -> Iterator[None]:
        """Let a module compute: its forward and backward passes gather what they need, in all processes alike."""
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
