"""Keys of torchtitan's configuration files that octavo does not have, each with the reason.

Users of torchtitan bring their TOML files along. An unknown key looks like a typing error, and accepting a
key that has no effect would be worse. So each is refused, whatever its value, and the message says what
octavo does instead. The table covers torchtitan's TOML era, from the first files of 2025 to the last
`job_config.py`.

A row is removed when octavo gains the key; a test holds the table disjoint from the schema.


"""

from collections.abc import Mapping
from types import MappingProxyType

_NO_EXPERTS = "octavo has no mixture-of-experts models"
_DYNAMIC_SCALES = "scales are always dynamic, computed from the tensor they scale"
_RECOMPUTE_DEFAULTS = "recomputation is not configured beyond mode and selective_ac_option"
_FLIGHT_RECORDER = "PyTorch's flight recorder is set by its own environment variables"
_IMAGE_MODEL = "it belongs to an image model; octavo trains language models"
_NO_EXTENSIONS = (
    "the configuration has no extensions; a model of your own comes by experimental.custom_import"
)


def _moved(to: str) -> str:
    return f"here it is {to}"


_KEYS: Mapping[str, Mapping[str, str]] = {
    "job": {
        "print_args": _moved("job.print_config"),
        "use_for_integration_test": "octavo's tests name the files they use",
        "save_config_file": "the configuration is always saved, in run.json under job.dump_folder",
        "custom_config_module": _NO_EXTENSIONS,
    },
    "profiling": {
        "profiler_active": "one step is recorded every profile_freq steps",
        "profiler_warmup": "the warm-up before a recorded step is fixed",
    },
    "metrics": {
        "enable_color_printing": "colours are on; metrics.disable_color_printing turns them off",
        "rank_0_only": _moved("metrics.save_for_all_ranks, which means the opposite"),
    },
    "model": {
        "norm_type": "the model uses RMSNorm",
        "use_flex_attn": "attention goes through scaled_dot_product_attention",
        "attn_mask_type": _moved("training.document_mask, for block_causal; attention is always causal"),
    },
    "optimizer": {
        "fused": _moved('optimizer.implementation = "fused"'),
        "early_step_in_backward": "it excludes gradient clipping, which octavo always does",
    },
    "lr_scheduler": {
        "lr_min": _moved("lr_scheduler.min_lr_factor"),
        "total_steps": "the schedule spans training.steps",
    },
    "training": {
        "warmup_steps": _moved("lr_scheduler.warmup_steps"),
        "data_parallel_degree": _moved("parallelism.data_parallel_shard_degree"),
        "data_parallel_replicate_degree": _moved("parallelism.data_parallel_replicate_degree"),
        "data_parallel_shard_degree": _moved("parallelism.data_parallel_shard_degree"),
        "fsdp_reshard_after_forward": _moved("parallelism.fsdp_reshard_after_forward"),
        "tensor_parallel_degree": _moved("parallelism.tensor_parallel_degree"),
        "enable_loss_parallel": _moved("parallelism.disable_loss_parallel, its opposite"),
        "enable_async_tensor_parallel": _moved("parallelism.enable_async_tensor_parallel"),
        "enable_compiled_autograd": "the backward pass is compiled together with the forward",
        "gc_debug": "garbage collection has no debug mode",
        "dataloader": _moved("training.num_workers, threads that make batches ahead"),
        "debug_moe_force_load_balance": _NO_EXPERTS,
        "classifier_free_guidance_prob": _IMAGE_MODEL,
        "img_size": _IMAGE_MODEL,
        "test_mode": _IMAGE_MODEL,
    },
    "parallelism": {
        "enable_loss_parallel": _moved("parallelism.disable_loss_parallel, its opposite"),
        "enable_compiled_autograd": "the backward pass is compiled together with the forward",
        "module_fqns_per_model_part": _moved(
            "parallelism.pipeline_parallel_split_points, the modules that begin a stage"
        ),
        "pipeline_parallel_microbatches": _moved("parallelism.pipeline_parallel_microbatch_size"),
        "pipeline_parallel_expert_parallel_overlap": _NO_EXPERTS,
        "context_parallel_load_balancer": "positions are always balanced, from the front and the back",
        "expert_parallel_degree": _NO_EXPERTS,
        "expert_tensor_parallel_degree": _NO_EXPERTS,
        "expert_parallel_comm_backend": _NO_EXPERTS,
    },
    "checkpoint": {
        "interval_type": "checkpoint.interval counts steps",
        "model_weights_only": _moved("checkpoint.last_save_model_only"),
        "initial_load_in_hf_quantized": "octavo reads unquantised weights only",
        "enable_first_step_checkpoint": "set checkpoint.interval = 1 in a short trial run instead",
        "enable_ft_dataloader_checkpoints": "the data's position is always part of a checkpoint",
    },
    "activation_checkpoint": {
        "per_op_sac_force_recompute_mm_shapes_by_fqns": _RECOMPUTE_DEFAULTS,
        "early_stop": _RECOMPUTE_DEFAULTS,
        "memory_budget": _RECOMPUTE_DEFAULTS,
        "visualize_memory_budget_pareto": _RECOMPUTE_DEFAULTS,
        "preserve_rng_state": _RECOMPUTE_DEFAULTS,
        "determinism_check": _RECOMPUTE_DEFAULTS,
        "debug": _RECOMPUTE_DEFAULTS,
    },
    "compile": {
        "backend": "the backend is inductor",
    },
    "float8": {
        "enable_float8_linear": _moved('model.converters = ["float8"]'),
        "force_recompute_fp8_weight_in_bwd": "what backward recomputes is set by activation_checkpoint.mode",
        "scaling_type_input": _DYNAMIC_SCALES,
        "scaling_type_weight": _DYNAMIC_SCALES,
        "scaling_type_grad_output": _DYNAMIC_SCALES,
        "moe_fqns_prototype": _NO_EXPERTS,
    },
    "comm": {
        "trace_buf_size": _FLIGHT_RECORDER,
        "save_traces_folder": _FLIGHT_RECORDER,
        "save_traces_file_prefix": _FLIGHT_RECORDER,
        "mode": "collectives are real; gloo runs them on a CPU, so N processes need no GPU",
    },
    "validation": {
        "enabled": _moved("validation.enable"),
        "dataloader": _moved("training.num_workers, which serves training; validation reads in line"),
    },
    "memory_estimation": dict.fromkeys(
        ("enable", "enabled", "disable_fake_mode"),
        "the trainer has no estimation mode",
    ),
    "fault_tolerance": dict.fromkeys(
        (
            "enable",
            "process_group",
            "process_group_timeout_ms",
            "replica_id",
            "group_size",
            "min_replica_size",
            "semi_sync_method",
            "sync_steps",
            "should_quantize",
            "fragment_sync_delay",
            "fragment_update_alpha",
        ),
        "octavo does not use TorchFT; a run that stops resumes from its latest checkpoint",
    ),
    "experimental": {
        "custom_args_module": _NO_EXTENSIONS,
        "custom_model_path": _moved("experimental.custom_import"),
        "early_step_in_backward": "it excludes gradient clipping, which octavo always does",
        "enable_compiled_autograd": "the backward pass is compiled together with the forward",
        "enable_async_tensor_parallel": _moved("parallelism.enable_async_tensor_parallel"),
        "pipeline_parallel_degree": _moved("parallelism.pipeline_parallel_degree"),
        "pipeline_parallel_split_points": _moved("parallelism.pipeline_parallel_split_points"),
        "pipeline_parallel_schedule": _moved("parallelism.pipeline_parallel_schedule"),
        "pipeline_parallel_schedule_csv": _moved("parallelism.pipeline_parallel_schedule_csv"),
        "pipeline_parallel_microbatches": _moved("parallelism.pipeline_parallel_microbatch_size"),
        "context_parallel_degree": _moved("parallelism.context_parallel_degree"),
        "context_parallel_rotate_method": _moved("parallelism.context_parallel_rotate_method"),
    },
    "debug": {
        "seed": _moved("training.seed"),
        "deterministic": _moved("training.deterministic"),
        "deterministic_warn_only": "training.deterministic refuses what has no deterministic form",
        "moe_force_load_balance": _NO_EXPERTS,
        "print_config": _moved("job.print_config"),
        "save_config_file": "the configuration is always saved, in run.json under job.dump_folder",
    },
}

_SECTIONS: Mapping[str, str] = {
    "mx": "MX formats are not a converter of their own; see float8.recipe_name",
    "quantize": "its keys for linear layers are those of [float8]; octavo has no grouped matmuls",
    "liger_kernel": "octavo uses PyTorch's own loss",
    "debug": "seed, deterministic and print_config are in [training] and [job]",
    "encoder": _IMAGE_MODEL,
    "eval": _IMAGE_MODEL,
    "inference": _IMAGE_MODEL,
}

KEYS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {s: MappingProxyType(dict(k)) for s, k in _KEYS.items()}
)
"""section -> key -> why octavo does not have it."""

SECTIONS: Mapping[str, str] = MappingProxyType(dict(_SECTIONS))
"""Sections that octavo does not have at all -> why."""


def reason(section: str, key: str) -> str | None:
    """Why octavo has no `section.key`, if torchtitan has one."""
    first = key.partition(".")[0]  # sections within sections: training.dataloader.num_workers
    return KEYS.get(section, {}).get(first) or section_reason(section)


def section_reason(section: str) -> str | None:
    """Why octavo has no section of this name, if torchtitan has one."""
    return SECTIONS.get(section)
