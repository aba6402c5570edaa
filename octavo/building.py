"""From a job to a model that is ready to train: built on no device, converted, parallelised, and only then
given memory and its initial weights.
"""

from typing import Any

import torch
from torch import nn

from octavo import models, quantization
from octavo.components.device import DTYPES
from octavo.components.init import init_weights
from octavo.components.logging import logger
from octavo.components.tokenizer import Tokenizer
from octavo.config import ConfigError, JobConfig
from octavo.distributed.mesh import World
from octavo.distributed.plan import Parallelize, Sharding
from octavo.hf.training import check_exportable


def model_args(job: JobConfig, tokenizer: Tokenizer) -> Any:
    """The model's own arguments, fitted to the job; `ConfigError` where they can't be."""
    spec = models.get(job.model.name)
    args = spec.configure(spec.args(job.model.flavor), tokenizer.vocab_size, job.training.seq_len)
    if job.checkpoint.last_save_in_hf:
        check_exportable(spec)
    if not job.training.document_mask:
        return args
    if spec.mask_documents is None:
        raise ConfigError(
            f"training.document_mask = true: the model {spec.name} has no such mask; leave it out"
        )
    return spec.mask_documents(args, tokenizer.eos_id)


def build_model(
    job: JobConfig,
    args: Any,
    recipe: str | None,
    *,
    device: torch.device,
    param_dtype: torch.dtype,
    world: World,
) -> tuple[nn.Module, float]:
    """The model with `args` on `device`, in float8 `recipe` if there is one; and its FLOPs per token."""
    spec = models.get(job.model.name)
    if world.pipeline is not None:
        raise ConfigError("parallelism.pipeline_parallel_degree must be 1: no schedule runs a pipeline yet")
    logger.info("Building %s %s with %s", spec.name, job.model.flavor, args)
    with torch.device("meta"):
        model = spec.build(args)
    if recipe is not None:
        if job.compile.enable:
            quantization.keep_casts_under_compile()
        quantization.convert(
            model,
            recipe,
            job.float8,
            device,
            filters_given_on_cli=job.given.get("float8.filter_fqns") == "cli",
        )
    if job.model.print_after_conversion:
        logger.info("Model after conversion: %s", model)
    size = sum(p.numel() for p in model.parameters())
    logger.info("Model %s %s size: %s total parameters", spec.name, job.model.flavor, f"{size:,}")
    flops_per_token = spec.flops_per_token(args, model, job.training.seq_len)

    spec.parallelize(model, _plan(job, param_dtype, world))
    model.to_empty(device="cpu" if job.training.enable_cpu_offload else device)
    init_weights(model, job.training.seed)
    return model.train(), flops_per_token


def _plan(job: JobConfig, param_dtype: torch.dtype, world: World) -> Parallelize:
    sharding = None
    # Whole parameters in float32 need no wrapper; FSDP2 also casts to param_dtype, and offloads.
    alone = world.sharding.size() == 1 and param_dtype is torch.float32
    if not alone or job.training.enable_cpu_offload:
        sharding = Sharding(
            mesh=world.sharding,
            param_dtype=param_dtype,
            reduce_dtype=DTYPES[job.training.mixed_precision_reduce],
            reshard=job.parallelism.fsdp_reshard_after_forward != "never",
            cpu_offload=job.training.enable_cpu_offload,
        )
    tensor = None
    if world.tensor is not None:
        tensor = quantization.tensor_parallel(world.tensor, loss_parallel=world.loss_parallel)
    return Parallelize(
        activation_checkpoint=job.activation_checkpoint,
        compile_model=job.compile.enable and "model" in job.compile.components,
        sharding=sharding,
        tensor=tensor,
        context=world.context,
    )
