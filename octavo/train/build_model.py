"""Builds the model of a job: on the meta device, converted to float8, parallelised, and only then allocated
and given its initial weights.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from octavo import models
from octavo.config import ConfigError, JobConfig
from octavo.core.logging import logger
from octavo.distributed.mesh import World
from octavo.distributed.mixed_precision import give_copies
from octavo.distributed.parallelize_plan import FSDPPlan, Parallelize, Replicas
from octavo.distributed.stages import LocalStages, cut
from octavo.hf.training_io import require_exportable
from octavo.metrics.device import DTYPES
from octavo.metrics.mfu import Work, work_of
from octavo.models.init import init_weights
from octavo.models.loss import ChunkedLoss, loss_and_gradient
from octavo.preflight.pipeline_plan import PipelinePlan, plan_of
from octavo.preflight.sizes import undivided
from octavo.tokenizer import Tokenizer
from octavo.train import quantization


def model_args(job: JobConfig, tokenizer: Tokenizer) -> Any:
    """The model's arguments, adapted to the job; `ConfigError` if they do not fit it."""
    spec = models.get(job.model.name)
    args = spec.configure(
        spec.args(job.model.flavor, job.model.args), tokenizer.vocab_size, job.training.seq_len
    )
    for problem in undivided(spec.shared_sizes(args), job.parallelism.tensor_parallel_degree):
        raise ConfigError(problem)
    if job.checkpoint.last_save_in_hf:
        require_exportable(spec)
    if not job.training.document_mask:
        return args
    if spec.mask_documents is None:
        raise ConfigError(
            f"training.document_mask = true: the model {spec.name} has no document mask; leave it out"
        )
    return spec.mask_documents(args, tokenizer.eos_id)


def pipeline_plan(job: JobConfig, args: Any) -> PipelinePlan | None:
    """How the model is split into pipeline stages, or None; `ConfigError` if it can't be."""
    spec = models.get(job.model.name)
    if job.parallelism.pipeline_parallel_degree == 1:
        return None
    if spec.pipeline is None:
        raise ConfigError(
            f"parallelism.pipeline_parallel_degree: the model {spec.name} has no pipeline stages; set it to 1"
        )
    return plan_of(job, spec.pipeline.units(args))


class Built(NamedTuple):
    """model: this process's part of the model. stages: its pipeline stages, which compute; empty without.
    args: the whole model's arguments. param_dtype: what it computes in.
    """

    model: nn.Module
    work: Work
    stages: list[nn.Module]
    args: Any
    param_dtype: torch.dtype


def build_model(
    job: JobConfig,
    args: Any,
    recipe: str | None,
    *,
    device: torch.device,
    param_dtype: torch.dtype,
    world: World,
    pipeline: PipelinePlan | None = None,
    materialise: Callable[[nn.Module], object] | None = None,
    copies: bool = True,
) -> Built:
    """Build the model with `args` on `device`, in float8 `recipe` unless that is None.

    copies: whether this process may compute in copies of its parameters (see `mixed_precision.py`), as on a
    CPU. `materialise` allocates a part built on the meta device; the default also sets the initial weights.
    """
    spec = models.get(job.model.name)
    logger.info("Building %s %s with %s", spec.name, job.model.flavor, args)
    dtype = DTYPES[job.training.dtype]
    with torch.device("meta"):
        model = spec.build(args)
        for parameter in model.parameters():
            parameter.data = parameter.to(dtype)
    if recipe is not None:
        if job.compile.enable:
            quantization.keep_casts_under_compile()
            quantization.keep_traces_of_compiled_layers()
        quantization.convert(
            model,
            recipe,
            job.float8,
            device,
            filters_given_on_cli=job.given.get("float8.filter_fqns") == "cli",
            divided=world.tensor is not None,
        )
    if job.model.print_after_conversion:
        logger.info("Model after conversion: %s", model)
    size = sum(p.numel() for p in model.parameters())
    logger.info("Model %s %s size: %s total parameters", spec.name, job.model.flavor, f"{size:,}")
    work = _work(job, spec, args, model, device, param_dtype)

    fusion = quantization.build_fusion(job, recipe, device) if spec.fuses else None
    if job.model.fuse == "on" and fusion is None:
        raise ConfigError(f"model.fuse = on: the model {spec.name} cannot be fused; leave it out")

    _chunk_loss(job, spec, model)

    copies = copies and spec.casts_inputs and _computes_in_copies(job, device, param_dtype, world)

    def ready(part: nn.Module) -> nn.Module:
        spec.parallelize(part, replace(_plan(job, dtype if copies else param_dtype, world), fusion=fusion))
        if copies:
            give_copies(part, param_dtype)
        if materialise is not None:
            materialise(part)
        else:
            part.to_empty(device="cpu" if job.training.enable_cpu_offload else device)
            init_weights(part, job.training.seed)
        return part.train()

    if pipeline is None or world.pipeline is None:
        return Built(ready(model), work, [], args, param_dtype)
    numbers = pipeline.stages_of(world.pipeline.get_local_rank())
    stages = [ready(cut(model, pipeline.stages[number])) for number in numbers]
    for number in numbers:
        logger.info("Pipeline stage %d has %s", number, ", ".join(pipeline.stages[number]))
    return Built(LocalStages(stages, numbers), work, stages, args, param_dtype)


def _chunk_loss(job: JobConfig, spec: models.ModelSpec, model: nn.Module) -> None:
    tokens = job.training.loss_chunk_tokens
    if tokens is None:
        return
    if spec.chunk_loss is None:
        raise ConfigError(
            f"training.loss_chunk_tokens = {tokens}: the model {spec.name} cannot compute its loss in "
            "chunks; leave it out"
        )
    compiled = job.compile.enable and "loss" in job.compile.components
    softmax = torch.compile(loss_and_gradient) if compiled else loss_and_gradient
    spec.chunk_loss(model, ChunkedLoss(tokens, softmax, quantization.cast_head_once))
    logger.info("The loss is computed in chunks of %d tokens; the full logits are never materialized", tokens)


def _work(
    job: JobConfig,
    spec: models.ModelSpec,
    args: Any,
    model: nn.Module,
    device: torch.device,
    param_dtype: torch.dtype,
) -> Work:
    """The FLOPs per token of the whole model."""
    seq_len, high = job.training.seq_len, str(param_dtype).removeprefix("torch.")
    precisions = quantization.product_precisions(model, device, high)
    compiled = job.compile.enable and "model" in job.compile.components
    return work_of(
        model,
        spec.flops_per_token(args, model, seq_len),
        precisions,
        high,
        job.activation_checkpoint,
        spec.layer_products and spec.layer_products(args, seq_len),
        to_the_end=not compiled and quantization.has_float8_layers(model),
    )


def _computes_in_copies(job: JobConfig, device: torch.device, param_dtype: torch.dtype, world: World) -> bool:
    """Whether parameters of another dtype than the compute dtype need no FSDP2 (see `mixed_precision.py`)."""
    alone = world.size == 1 and device.type == "cpu" and not job.training.enable_cpu_offload
    return alone and param_dtype is not DTYPES[job.training.dtype]


def _plan(job: JobConfig, param_dtype: torch.dtype, world: World) -> Parallelize:
    sharding = replicas = None
    reduce_dtype = DTYPES[job.training.mixed_precision_reduce]
    # Unsharded parameters in the compute dtype need no wrapper; casting and offloading need FSDP2.
    whole = (
        world.layout.sharded == 1
        and param_dtype is DTYPES[job.training.dtype]
        and not job.training.enable_cpu_offload
    )
    if whole and world.layout.replicate == world.size > 1:
        replicas = Replicas(world.sharding["dp_replicate"], reduce_dtype)
    elif not whole or world.layout.replicate > 1:
        sharding = FSDPPlan(
            mesh=world.sharding,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            reshard=_reshards(job, world),
            reshard_last=job.parallelism.fsdp_reshard_after_forward == "always",
            cpu_offload=job.training.enable_cpu_offload,
        )
    tensor = None
    if world.tensor is not None:
        tensor = quantization.tensor_parallel_styles(
            world.tensor,
            loss_parallel=world.loss_parallel,
            asynchronous=job.parallelism.enable_async_tensor_parallel,
        )
    return Parallelize(
        activation_checkpoint=job.activation_checkpoint,
        compile_model=job.compile.enable and "model" in job.compile.components,
        sharding=sharding,
        tensor=tensor,
        context=world.context,
        replicas=replicas,
        ring=_takes_ring(job, param_dtype, world),
    )


def _takes_ring(job: JobConfig, param_dtype: torch.dtype, world: World) -> bool:
    """Whether attention over several processes is a ring. On a GPU that is faster: the gathered keys need a
    mask, which flash attention does not take.
    """
    method = job.parallelism.context_parallel_rotate_method
    if method != "auto" or world.context is None:
        return method == "alltoall"
    on_gpus = world.context.device_type == "cuda"
    return on_gpus and not job.training.document_mask and param_dtype != torch.float32


def _reshards(job: JobConfig, world: World) -> bool:
    """Whether gathered weights are freed after forward. In a pipeline they would be gathered again for each
    microbatch, so there it happens only with `always`.
    """
    policy = job.parallelism.fsdp_reshard_after_forward
    return policy == "always" or (policy == "default" and world.pipeline is None)
