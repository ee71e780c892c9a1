"""Every name of another library that the code uses without that library's promise to keep it.

Private are names with a leading underscore, and attributes and modules that the library's documentation does not mention. Each can
change in any release of the library, which is why pyproject.toml gives these libraries an upper bound. To raise a bound: install
the new version, run `test_private_names.py` next to this file, and mend what is no longer there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    """A name of another library that may change without notice.

    Args:
        name: dotted; everything but the last component is a module or class that can be imported, the last one an attribute that
            it has or that its source assigns (to an instance, a parameter).
        used_in: modules that use it.
        why: what it is used for, and why no public name serves.
    """

    name: str
    used_in: tuple[str, ...]
    why: str

    @property
    def library(self) -> str:
        """Return the distribution's top-level package."""
        return self.name.partition(".")[0]


_ZERO = "llava_keeplora.deepspeed_zero"
_ENGINE = "llava_keeplora.sequence.deepspeed_state"
_TRAINER = "llava_keeplora.sequence.trainer"
_METER = "llava_keeplora.plan.allocation_tracker"
_OWN_STATE = "DeepSpeed saves its training state as pickles only; this is where the fp32 weights are"

PRIVATE_NAMES = (
    # DeepSpeed: parameters of ZeRO-3
    PrivateName(
        "deepspeed.runtime.zero.partition_parameters.ds_id", (_ZERO,), "tells a shard from a whole parameter"
    ),
    PrivateName(
        "deepspeed.runtime.zero.partition_parameters.ds_numel", (_ZERO,), "a shard's own shape is empty"
    ),
    PrivateName(
        "deepspeed.runtime.zero.partition_parameters.ds_tensor",
        (_ENGINE, "llava_keeplora_eval.checkpoints"),
        "the part that this process holds, for checkpoints between steps and to find weights that were never loaded",
    ),
    PrivateName(
        "deepspeed.runtime.zero.stage3._z3_optimizer",
        (_ZERO,),
        "ends an engine's hold on a parameter, which would keep its fp32 copy alive",
    ),
    PrivateName(
        "deepspeed.runtime.zero.stage_1_and_2._hp_mapping", (_ZERO,), "the same for ZeRO-1 and 2 and bf16"
    ),
    # DeepSpeed: optimisers
    PrivateName(
        "deepspeed.runtime.zero.stage_1_and_2.single_partition_of_fp32_groups", (_ENGINE,), _OWN_STATE
    ),
    PrivateName("deepspeed.runtime.zero.stage3.fp32_partitioned_groups_flat", (_ENGINE,), _OWN_STATE),
    PrivateName("deepspeed.runtime.bf16_optimizer.fp32_groups_flat_partition", (_ENGINE,), _OWN_STATE),
    PrivateName("deepspeed.runtime.fp16.fused_optimizer.fp32_groups_flat", (_ENGINE,), _OWN_STATE),
    PrivateName(
        "deepspeed.runtime.zero.stage3.sub_group_to_group_id",
        (_ENGINE,),
        "which parameter group a partition of ZeRO-3 belongs to",
    ),
    PrivateName(
        "deepspeed.runtime.zero.stage3.persistent_parameters",
        (_ENGINE,),
        "small parameters stay whole between steps and are restored from their shards",
    ),
    PrivateName(
        "deepspeed.runtime.zero.stage3.optimizer_swapper",
        (_ENGINE,),
        "an optimiser on disk cannot be read, so nothing is kept between its steps",
    ),
    PrivateName(
        "deepspeed.ops.__compatible_ops__",
        ("llava_keeplora.deepspeed_ops",),
        "keeps an operator of its inference engine from being compiled; no setting does",
    ),
    PrivateName("deepspeed.runtime.zero.stage3.loss_scaler", (_ENGINE,), "fp16's loss scale at the step"),
    # transformers: the Trainer
    PrivateName(
        "transformers.Trainer._save_checkpoint", (_TRAINER,), "overridden: checkpoints without pickles"
    ),
    PrivateName(
        "transformers.Trainer._load_from_checkpoint",
        (_TRAINER,),
        "overridden: the state is restored once the engine exists",
    ),
    PrivateName(
        "transformers.Trainer._prepare_for_training",
        (_TRAINER,),
        "overridden: the first moment at which model, optimiser and schedule exist",
    ),
    PrivateName(
        "transformers.Trainer._load_rng_state",
        (_TRAINER,),
        "overridden: generators of every process from one file",
    ),
    PrivateName(
        "transformers.Trainer._tr_loss",
        (_TRAINER,),
        "part of the mean loss; without it a resumed training logs another",
    ),
    PrivateName("transformers.Trainer._total_loss_scalar", (_TRAINER,), "the same"),
    PrivateName("transformers.Trainer._globalstep_last_logged", (_TRAINER,), "the same"),
    PrivateName("transformers.Trainer._initial_global_step", (_TRAINER,), "the same"),
    PrivateName(
        "transformers.trainer.TRAINER_STATE_NAME",
        (_TRAINER,),
        "the file from which the Trainer reads its own record",
    ),
    PrivateName(
        "transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK",
        ("llava_keeplora.start.training_args",),
        "the names that report_to accepts, to refuse others before the first task",
    ),
    # transformers: DeepSpeed, models, processors
    PrivateName(
        "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref",
        (_ZERO,),
        "put back after a model was loaded whole under ZeRO-3; there is no public getter",
    ),
    PrivateName(
        "transformers.integrations.deepspeed.unset_hf_deepspeed_config",
        (_ZERO,),
        "loads a model whole under ZeRO-3",
    ),
    PrivateName(
        "transformers.integrations.deepspeed.set_hf_deepspeed_config",
        (_ZERO,),
        "lets generation run in step over the processes",
    ),
    PrivateName(
        "transformers.PreTrainedModel._from_config",
        ("scripts.random_llava",),
        "a model class from a configuration in a given dtype; the public `from_config` is the auto classes' only",
    ),
    PrivateName(
        "transformers.configuration_utils._name_or_path",
        ("llava_keeplora_eval.content",),
        "says where a model was loaded from, not what it is",
    ),
    PrivateName(
        "transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES",
        ("llava_keeplora_eval.processors",),
        "the processor of a model type, where a checkpoint's files name none",
    ),
    PrivateName(
        "transformers.processing_utils.ProcessorMixin.check_argument_for_proper_class",
        ("llava_keeplora_eval.processors",),
        "lets a processor do without a video processor, which exists with torchvision only",
    ),
    PrivateName(
        "transformers.models.pixtral.image_processing_pil_pixtral",
        ("llava_keeplora_eval.processors",),
        "has what Pixtral's processor imports from the image processor by torchvision",
    ),
    # PEFT, accelerate
    PrivateName(
        "peft.tuners.lora.LoraLayer.frozen_peft_weight_names",
        ("llava_keeplora.adapters.lora",),
        "keeps A frozen when an adapter is set active again",
    ),
    *(
        PrivateName(
            f"peft.tuners.osf.OSFLayer.{name}",
            ("llava_keeplora.methods.osf",),
            "the directions off which OSF projects its steps",
        )
        for name in ("_osf_U_high", "_osf_V_high", "_osf_U_low_init", "_osf_V_low_init")
    ),
    PrivateName("accelerate.Accelerator.scaler", (_TRAINER,), "fp16's loss scale without DeepSpeed"),
    # bitsandbytes
    PrivateName(
        "bitsandbytes.nn.Params4bit.quant_state",
        ("llava_keeplora.adapters.weights",),
        "expands a 4-bit weight",
    ),
    PrivateName(
        "bitsandbytes.nn.Int8Params.SCB",
        ("llava_keeplora.adapters.weights",),
        "the row scales of an 8-bit weight",
    ),
    PrivateName(
        "bitsandbytes.MatmulLtState.SCB",
        ("llava_keeplora.adapters.weights",),
        "where the first forward pass moves these scales",
    ),
    PrivateName(
        "bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu",
        ("llava_keeplora.models.quantization",),
        "keeps a 4-bit weight from being repacked in place by its first evaluation",
    ),
    # datasets
    PrivateName(
        "datasets.packaged_modules.csv.csv.Csv._generate_tables",
        ("llava_keeplora_recipes.hub_layout",),
        "replaced, so that cells of a CSV file are the text that is written",
    ),
    PrivateName(
        "datasets.packaged_modules.csv.csv.Csv._cast_table",
        ("llava_keeplora_recipes.hub_layout",),
        "gives such a table the columns' types",
    ),
    PrivateName(
        "datasets.packaged_modules.folder_based_builder.folder_based_builder.FolderBasedBuilder._read_metadata",
        ("llava_keeplora_recipes.hub_layout",),
        "replaced, so that cells of metadata.csv and metadata.jsonl are what is written",
    ),
    PrivateName(
        "datasets.packaged_modules.folder_based_builder.folder_based_builder.FolderBasedBuilder._generate_examples",
        ("llava_keeplora_recipes.hub_layout",),
        "given the metadata files in the order of their names",
    ),
    PrivateName(
        "datasets.packaged_modules.json.json.Json._generate_tables",
        ("llava_keeplora_recipes.hub_layout",),
        "replaced, so that values of a JSON file are what is written",
    ),
    PrivateName(
        "datasets.packaged_modules.json.json.Json._cast_table",
        ("llava_keeplora_recipes.hub_layout",),
        "gives such a table the columns' types",
    ),
    # evaluate: the way in which its guide has a metric written
    PrivateName(
        "evaluate.Metric._info",
        ("llava_keeplora_eval.metrics.evaluate_metric",),
        "overridden, as evaluate's guide to a new metric says",
    ),
    PrivateName(
        "evaluate.Metric._compute",
        ("llava_keeplora_eval.metrics.evaluate_metric",),
        "overridden, as evaluate's guide to a new metric says",
    ),
    # Python
    PrivateName(
        "argparse._ActionsContainer._actions",
        ("scripts.write_docs",),
        "a parser does not list its arguments otherwise",
    ),
    PrivateName(
        "argparse._SubParsersAction._choices_actions",
        ("scripts.write_docs",),
        "the one-line help of each command",
    ),
    # torch
    PrivateName(
        "torch.ops.mkldnn._is_mkldnn_bf16_supported",
        ("llava_keeplora.precision",),
        "whether products of bfloat16 matrices are fast on this CPU, by the rule that torch itself asks",
    ),
    PrivateName(
        "torch.nn.Module._parameters",
        (_METER,),
        "fake weights for the length of a measurement, shared ones shared",
    ),
    PrivateName(
        "torch.nn.Module._forward_hooks",
        ("llava_keeplora.testing.methods",),
        "checks that a method leaves no hook on the model",
    ),
    PrivateName(
        "torch.nn.Module._forward_pre_hooks",
        ("llava_keeplora.testing.methods",),
        "the same",
    ),
    PrivateName("torch.nn.Module._buffers", (_METER,), "the same"),
    PrivateName(
        "torch._C._DisableTorchDispatch",
        (_METER,),
        "a result that is known is made without asking for it again",
    ),
    PrivateName("torch._subclasses.fake_tensor.FakeTensor", (_METER,), "shapes without memory"),
    PrivateName("torch._subclasses.fake_tensor.FakeTensorMode", (_METER,), "shapes without memory"),
    PrivateName(
        "torch._subclasses.fake_tensor.unset_fake_temporarily", (_METER,), "small whole numbers are computed"
    ),
    PrivateName(
        "torch.utils._python_dispatch.TorchDispatchMode", (_METER,), "sees every operation that allocates"
    ),
    PrivateName("torch.utils._pytree.tree_map_only", (_METER,), "finds the tensors of an operation's result"),
    PrivateName("torch.ops.aten._local_scalar_dense", (_METER,), "what `.item()` of a fake tensor gives"),
)
