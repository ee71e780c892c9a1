"""DeepSpeed's ZeRO-3, which shards the weights over the processes, outside of training.

In training, `transformers.Trainer` creates the engine that gathers the shards. The passes and the evaluation
need an engine as well, without an optimiser and only while they run; single weights are gathered one layer at
a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

#: Sections of a DeepSpeed JSON that passes and evaluation need, as well as zero_optimization.
KEPT = ("bf16", "communication_data_type", "comms_logger")
#: Keys of zero_optimization that only training needs.
ONLY_TRAINING = ("offload_optimizer",)
#: Attributes by which the optimisers of ZeRO-3, and of ZeRO-1, 2 and bf16, link a parameter to their fp32
#: copy.
LINKS = ("_z3_optimizer", "_hp_mapping")


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is sharded by ZeRO-3; its own shape is then empty."""
    return hasattr(parameter, "ds_id")


def number_count(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter has, whether it is sharded or not."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def gathered(parameters: Iterable[Tensor | None], write: bool = False) -> Iterator[None]:
    """Gather sharded parameters in every process while the block runs; every process must call this.

    Args:
        parameters: the parameters; those that are not sharded, and None, are skipped.
        write: whether to keep the changes that the main process makes to them.
    """
    shards = [p for p in parameters if p is not None and is_partitioned(p)]
    if not shards:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shards, modifier_rank=0 if write else None):
        yield


def trained_values(parameter: nn.Parameter) -> Tensor:
    """Return a copy of a parameter in fp32, gathered; from the optimiser's fp32 copy if DeepSpeed keeps one.

    Every process must call this.
    """
    if any(hasattr(parameter, link) for link in LINKS):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().float().clone()
    with gathered([parameter]):
        return parameter.detach().float().clone()


def forget_engine(parameters: Iterable[nn.Parameter]) -> None:
    """Remove parameters' links to an engine that has ended, which would keep its fp32 copies in memory."""
    for parameter in parameters:
        for link in LINKS:
            vars(parameter).pop(link, None)


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Let transformers load models unsharded while the block runs; `Zero.adopt` shards them afterwards."""
    from transformers.integrations import deepspeed as integration

    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config


def keep_scalars_whole(model: nn.Module) -> None:
    """Turn frozen parameters of one number (CLIP's temperature, SigLIP's bias) into buffers.

    DeepSpeed moves parameters as views of bytes, which a scalar does not have, and would shard a single
    number to one process alone. A vector of one number becomes a buffer only if it belongs to the model
    itself, where it is read outside of the forward pass.
    """
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if (p.dim() == 0 or (module is model and p.numel() == 1)) and not p.requires_grad:
                delattr(module, name)
                module.register_buffer(name, p.detach())


class Zero:
    """A run's DeepSpeed configuration outside of training; a no-op without one.

    Args:
        config: the configuration without `auto` precisions, or None; see
            `llava_keeplora.config.deepspeed_config`.
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
        # While this object exists, transformers loads in shards and keeps processes synchronous in
        # `generate`.
        self._hf_config = HfDeepSpeedConfig(self._copy())

    def _copy(self) -> dict[str, Any]:
        # DeepSpeed changes the dict that it gets.
        return json.loads(json.dumps(self.config))

    def adopt(self, model: nn.Module) -> None:
        """Prepare a frozen model for DeepSpeed; with ZeRO-3, shard it over the processes."""
        if self.used:
            keep_scalars_whole(model)
        if not self.partitions or all(map(is_partitioned, model.parameters())):
            return
        import deepspeed

        deepspeed.zero.Init(module=model, config_dict_or_path=self._copy())
        for module in model.modules():
            # CLIP's embeddings read the length of their position table before they use it; a shard's is 0.
            if isinstance(table := getattr(module, "position_embedding", None), nn.Embedding):
                deepspeed.zero.register_external_parameter(module, table.weight)
            # It reads its output projection's weight without calling it (SigLIP's pooling head has one).
            if isinstance(module, nn.MultiheadAttention):
                for p in module.out_proj.parameters():
                    deepspeed.zero.register_external_parameter(module, p)

    @contextmanager
    def engaged(self, module: nn.Module) -> Iterator[None]:
        """Create an engine while the block runs, so that the module's passes gather the weights they need.

        All processes must run the same passes.
        """
        if not self.partitions:
            yield
            return
        import deepspeed
        from transformers.integrations.deepspeed import set_hf_deepspeed_config

        # A Trainer may have set its own configuration meanwhile.
        set_hf_deepspeed_config(self._hf_config)
        engine, *_ = deepspeed.initialize(model=module, config=self._copy())
        try:
            yield
        finally:
            engine.destroy()
