"""The trainer's interface to `octavo.float8`: converts the model as the config says, and logs the result."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
)

from octavo.config import ConfigError, JobConfig, names
from octavo.config.layer_recipes import LayerRecipe, layer_recipes, matching, recipes_named
from octavo.config.needs import fuses
from octavo.config.schema import Float8
from octavo.core.format import count
from octavo.core.logging import logger
from octavo.distributed.parallelize_plan import Fusion, TensorParallel
from octavo.float8 import (
    RECIPES,
    DelayedScaling,
    Float8Linear,
    Float8LinearConfig,
    cast_weights_once,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from octavo.float8.checks.fake_gpu import force_hardware_path as force_hardware_path
from octavo.float8.checks.fake_gpu import gather_in_float8 as gather_in_float8
from octavo.float8.checks.fake_gpu import simulate_gpu as simulate_gpu
from octavo.float8.checks.selfcheck import Check, check_device
from octavo.float8.convert import grouped_modules
from octavo.float8.distributed.parallel_styles import (
    Float8ColwiseParallel,
    Float8RowwiseParallel,
    PrepareFloat8ModuleInput,
)
from octavo.float8.fused import GatedLinear, NormedInput, SharedInput
from octavo.float8.grouped import why_not_grouped
from octavo.float8.health import Measurement, Monitor, audit
from octavo.float8.matmul import EmulationWarning, choose_backend, describe_backend
from octavo.models.init import plain_name
from octavo.train.hooks import Hook, StepRecord

DEFAULT_RECIPE = "tensorwise"
REMEDIES = ("rowwise", "blockwise")
"""Recipes with finer scales, to try on a layer that loses much; the first that helps is recommended."""

CONTROLS = MappingProxyType(
    {
        "unscaled_e5m2": replace(
            RECIPES["tensorwise"].map_casts(lambda cast: replace(cast, scaled=False)), name="unscaled_e5m2"
        )
    }
)
"""Negative controls: recipes known to train badly, by name. A comparison that does not flag them is too
insensitive to judge any. The gradients of a mean over a batch's tokens are below the range of unscaled e5m2,
and become zero.
"""


def describe_recipes(device: torch.device) -> dict[str, str]:
    """One line per recipe on whether and how `device` computes it in hardware."""
    return {name: describe_backend(recipe, device, None) for name, recipe in RECIPES.items()}


def check_products(device: torch.device) -> Iterator[Check]:
    """Check every product of every recipe on `device` once."""
    return check_device(device)


def recipe_name(converters: Sequence[str], settings: Float8) -> str | None:
    """The recipe the model trains in, or None for high precision."""
    if "float8" not in converters:
        return None
    return settings.recipe_name or DEFAULT_RECIPE


def keep_casts_under_compile() -> None:
    """Make compiled layers round to bfloat16 where eager layers do.

    Otherwise the value cast to float8 in forward and the one recomputed in backward can differ, and rowwise
    training went to NaN (pytorch issue 150859). Later versions of torch do so themselves for saved tensors;
    earlier ones need the general option.
    """
    import torch._inductor.config as inductor

    if not hasattr(inductor, "emulate_precision_casts_on_saved_tensors"):
        inductor.emulate_precision_casts = True


def keep_traces_of_compiled_layers() -> None:
    """Let torch cache the traces of float8 layers for the next start, as it does for other layers.

    By default it excludes custom autograd functions. Ours are safe to cache: the cache key includes the
    operations of their forward and backward, and they have no other effects.
    """
    import torch._functorch.config as functorch

    functorch.autograd_cache_allow_custom_autograd_functions = True


def build_monitor(model: nn.Module, settings: Float8) -> Monitor | None:
    """A monitor of the float8 layers of `model`, over all processes' tokens; None if health is off."""
    if settings.health_every == 0 or not has_float8_layers(model):
        return None
    return Monitor(model, every=1, sample=settings.health_tokens or None, group=_world_group())


def _world_group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.get_world_size() > 1 else None


def try_recipes(
    model: nn.Module, layer: str, settings: Float8, loss: Callable[[], Tensor]
) -> tuple[Sequence[Measurement], Sequence[str]]:
    """What other recipes would do to the operands of `layer`, in one more forward and backward of `loss`.

    Returns its measurements in its own recipe and in the others, and the others' names in order of
    preference; nothing if the layer cannot be measured. Leaves no gradients.
    """
    own = {
        module.recipe.name
        for name, module in model.named_modules()
        if isinstance(module, Float8Linear) and plain_name(name) == layer
    }
    possible = names.GATHERABLE_RECIPES if settings.enable_fsdp_float8_all_gather else names.RECIPES
    others = [name for name in REMEDIES if name in possible and name not in own]
    try:
        table = audit(
            model,
            (),
            forward=loss,
            recipes=others,
            filter_fn=lambda _, name: name == layer,
            group=_world_group(),
        )
    except ValueError as error:
        logger.debug("No other recipe could be tried on %s: %s", layer, error)
        return [], []
    return table.rows, others


def has_float8_layers(model: nn.Module) -> bool:
    """Whether any layer of `model` is a float8 one."""
    return any(isinstance(module, Float8Linear) for module in model.modules())


def product_precisions(model: nn.Module, device: torch.device, high: str) -> dict[str, tuple[str, str, str]]:
    """The precision in which `device` computes output, grad_input and grad_weight of each linear layer, by
    name.

    Emulated float8 multiplies in float32; `high` is the precision of other layers.
    """
    by_layer: dict[str, tuple[str, str, str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if not isinstance(module, Float8Linear):
            by_layer[name] = (high, high, high)
            continue
        by_product = {
            product: high
            if not gemm.float8
            else ("float8" if choose_backend(gemm, device, module.emulate) else "float32")
            for product, gemm in module.recipe.gemms.items()
        }
        by_layer[name] = (by_product["output"], by_product["grad_input"], by_product["grad_weight"])
    return by_layer


def cast_weights_in_step(model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
    """Scope of one step's microbatches, float8 weights are cast once if `enabled`. No bit changes."""
    return cast_weights_once(model, enabled=enabled)


def cast_head_once(head: nn.Module) -> AbstractContextManager[None]:
    """Scope in which `head`, a linear layer, is called several times with one weight."""
    active = isinstance(head, Float8Linear) and head.weight_cache.active
    return cast_weights_once(head, enabled=not active)


def tensor_parallel_styles(
    mesh: DeviceMesh, *, loss_parallel: bool, asynchronous: bool = False
) -> TensorParallel:
    """The styles for a model whose products are sharded over `mesh`; float8 layers communicate float8."""
    return TensorParallel(mesh, loss_parallel, _colwise_style, _rowwise_style, _gather_style, asynchronous)


def _colwise_style(linear: nn.Module, **layouts: Any) -> ParallelStyle:
    style = Float8ColwiseParallel if isinstance(linear, Float8Linear) else ColwiseParallel
    return style(**layouts)


def _rowwise_style(linear: nn.Module, **layouts: Any) -> ParallelStyle:
    style = Float8RowwiseParallel if isinstance(linear, Float8Linear) else RowwiseParallel
    return style(**layouts)


def _gather_style(
    linears: Sequence[nn.Module], *, given: Placement, wanted: Placement, inputs: int
) -> ParallelStyle:
    rest = (None,) * (inputs - 1)
    before, after = (given, *rest), (wanted, *rest)
    recipes = {linear.recipe if isinstance(linear, Float8Linear) else None for linear in linears}
    recipe = recipes.pop()
    if recipes or recipe is None or recipe.output.a is None:  # one of them reads the tensor itself
        return PrepareModuleInput(input_layouts=before, desired_input_layouts=after)
    return PrepareFloat8ModuleInput(
        input_layouts=before, desired_input_layouts=after, float8_dtype=recipe.output.a.dtype
    )


def build_fusion(job: JobConfig, recipe: str | None, device: torch.device) -> Fusion | None:
    """The implementation of fused layers; None if modules are called one by one."""
    kernels = recipe is not None and device.type == "cuda"
    if not fuses(job):
        if kernels and job.model.fuse == "auto":
            logger.info(
                "Layers are not fused: tensor parallel weights and delayed scaling need separate calls"
            )
        return None
    if job.model.fuse == "auto" and not kernels:
        return None
    share = job.float8.share_scales and recipe == "tensorwise"
    logger.info(
        "Layers are fused: norms, gates and casts %s, products of one input as one%s",
        "by kernels" if device.type == "cuda" else "in plain PyTorch",
        ", their weights cast with one scale" if share else "",
    )
    logged: set[str] = set()

    def normed_input(norm: nn.Module, linears: Sequence[Any]) -> NormedInput:
        same_recipe = all(isinstance(m, Float8Linear) and m.recipe.name == recipe for m in linears)
        made = NormedInput(norm, linears, shared_scales=share and same_recipe)
        why = made.shared.why_separate()
        if why is not None and why not in logged:
            logged.add(why)
            logger.info("Some layers with one input remain separate products: %s", why)
        return made

    return Fusion(
        normed_input=normed_input,
        gated_linear=partial(GatedLinear, recompute=job.float8.recompute_gate),
        shared_input=SharedInput,
    )


def _options(recipe: str) -> Float8LinearConfig:
    if recipe in CONTROLS:
        return Float8LinearConfig.from_recipe(CONTROLS[recipe])
    return Float8LinearConfig.from_recipe_name(recipe)


def after_optimizer_step(model: nn.Module, settings: Float8) -> None:
    """Compute the scales of weights that FSDP gathers in float8 in one reduction, if configured."""
    if settings.enable_fsdp_float8_all_gather and settings.precompute_float8_dynamic_scale_for_fsdp:
        precompute_float8_dynamic_scale_for_fsdp(model)


class DelayedScalingSteps(Hook):
    """Delayed scaling in the trainer: ends steps, logs and saves. Does nothing for other recipes."""

    def __init__(self, scales: DelayedScaling | None) -> None:
        self._scales = scales
        self._saturated, self._fallbacks = 0.0, 0

    def before_update(self, record: StepRecord) -> None:
        """Make the maxima of this step the next step's scales. The guard's wait for the device came first."""
        if self._scales is None:
            return
        report = self._scales.end_step()
        self._saturated = max(self._saturated, report.saturated)
        self._fallbacks += report.falls_back
        if report.falls_back:
            logger.warning(
                "Step %d: %.2g of the elements of %s lay beyond the previous step's maximum, more than "
                "float8.max_saturated = %g; the next step measures its own",
                *(record.step, report.saturated, report.operand, self._scales.bound),
            )

    def take_counts(self) -> dict[str, Any]:
        """For a step's metrics: the largest saturated share since the last call, and all fallbacks so far."""
        saturated, self._saturated = self._saturated, 0.0
        return {"float8_saturated": saturated, "float8_fallbacks": self._fallbacks}

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run needs to cast identically; JSON-compatible, equal on every process."""
        if self._scales is None:
            return None
        return {**self._scales.state_dict(), "fallbacks": self._fallbacks}

    def load_state_dict(self, state: dict[str, Any] | None) -> dict[str, str]:
        """Restore `state`. Returns what could not be restored exactly, and why."""
        if self._scales is None:
            return {}
        if state is None:
            return {"float8 scales": "the checkpoint has no scales of the previous step"}
        self._fallbacks = state["fallbacks"]
        self._scales.load_state_dict(state)
        return {}


def build_delayed_scaling(
    model: nn.Module, recipe: str | None, settings: Float8, device: torch.device
) -> DelayedScalingSteps:
    """Delayed scaling, if `recipe` or that of any layer uses it."""
    if recipe is None or not set(recipes_named(settings)) & set(names.PREVIOUS_STEP_RECIPES):
        return DelayedScalingSteps(None)
    return DelayedScalingSteps(DelayedScaling(model, bound=settings.max_saturated, device=device))


def convert(
    model: nn.Module,
    recipe: str,
    settings: Float8,
    device: torch.device,
    *,
    filters_given_on_cli: bool,
    divided: bool = False,
) -> None:
    """Swap the linear layers and experts of `model`, in place, for float8 ones in `recipe`, except those that
    `filter_fqns` excludes and those that `layer_recipes` gives another recipe. `divided`: whether tensor
    parallelism divides each expert, whose scales would then be those of its parts.

    A filter excludes every layer whose full name contains it. Raises `ConfigError` if no layer is left to
    convert, if a pattern of `layer_recipes` decides about no layer, or if a filter from the command line
    matches none. A filter from a TOML file, which may be for several models, only logs a warning.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    experts = list(grouped_modules(model))
    for part in settings.filter_fqns:
        if not any(part in name for name in (*linears, *experts)):
            message = f"float8.filter_fqns: {part!r} matches no linear layer of this model"
            if filters_given_on_cli:
                raise ConfigError(f"{message}; it has, for example, {', '.join(linears[:3])}")
            logger.warning(message)

    chosen = _recipe_of_each([*linears, *experts], recipe, settings)
    _keep_experts(chosen, experts, divided=divided)
    kept = [name for name in linears if chosen[name] is None]
    if len(kept) == len(linears):
        key = "layer_recipes" if settings.layer_recipes else "filter_fqns"
        raise ConfigError(
            f"float8.{key} = {list(getattr(settings, key))} leaves none of the {len(linears)} linear "
            "layers to convert; take a filter out, or take float8 out of model.converters"
        )
    for name in dict.fromkeys(filter(None, chosen.values())):
        _convert_to(model, name, [layer for layer in chosen if chosen[layer] == name], settings, device)
    swapped = sum(isinstance(module, Float8Linear) for module in model.modules())
    logger.info(
        "Swapped to Float8Linear layers: %d of %d linear layers%s",
        swapped,
        len(linears),
        f"; in high precision: {_listed(kept)}" if kept else "",
    )
    converted = [name for name in experts if chosen[name] is not None]
    if converted:
        logger.info("Experts multiply in float8 in %s", count(len(converted), "layer"))


def _keep_experts(chosen: dict[str, str | None], experts: Sequence[str], *, divided: bool) -> None:
    """Choose high precision for experts that cannot be cast as chosen, and log why."""
    kept: dict[str, str] = {}
    for name in experts:
        recipe = chosen[name]
        if recipe is None:
            continue
        why = "tensor parallelism divides each" if divided else why_not_grouped(_options(recipe).to_recipe())
        if why is not None:
            chosen[name], kept[name] = None, why
    for why in dict.fromkeys(kept.values()):
        layers = [name for name in kept if kept[name] == why]
        logger.info("Experts stay in high precision: %s (%s)", why, _listed(layers))


def _recipe_of_each(linears: Sequence[str], default: str, settings: Float8) -> dict[str, str | None]:
    """The recipe of each linear layer, or None. `ConfigError` for a pattern that decides about no layer."""
    patterns = layer_recipes(settings)
    chosen: dict[str, str | None] = {}
    decided: set[LayerRecipe] = set()
    for name in linears:
        if any(part in name for part in settings.filter_fqns):
            chosen[name] = None
            continue
        pattern = matching(patterns, name)
        chosen[name] = default if pattern is None else pattern.recipe
        decided |= {pattern} if pattern is not None else set()
    for pattern in patterns:
        if pattern in decided:
            continue
        if not any(matching([pattern], name) for name in linears):
            why = f"matches none of the model's linear layers, like {', '.join(linears[:3])}"
        else:
            why = "decides about no layer: float8.filter_fqns or a later pattern decides about its matches"
        raise ConfigError(f"float8.layer_recipes: {pattern.text!r} {why}")
    return chosen


def _convert_to(
    model: nn.Module, recipe: str, layers: Sequence[str], settings: Float8, device: torch.device
) -> None:
    """Convert `layers` to `recipe`, and log it. FSDP gathers their weights in float8 if configured and
    possible.
    """
    config = _options(recipe)
    gathers = settings.enable_fsdp_float8_all_gather and config.to_recipe().gatherable
    config = replace(
        config, emulate=True if settings.emulate else None, enable_fsdp_float8_all_gather=gathers
    )
    names_to_convert = set(layers)
    warnings.filterwarnings("ignore", category=EmulationWarning)  # the log line below says so
    convert_to_float8_training(
        model, config=config, module_filter_fn=lambda _, name: name in names_to_convert
    )
    logger.info(
        "Float8 training active with recipe %s%s, %s",
        recipe,
        f" in {count(len(layers), 'layer')}" if settings.layer_recipes else "",
        describe_backend(config.to_recipe(), device, config.emulate),
    )
    if settings.enable_fsdp_float8_all_gather:
        precision = "float8" if gathers else f"high precision: {recipe} has no single float8 weight"
        layers_in_recipe = (
            f" of the {count(len(layers), f'{recipe} layer')}" if settings.layer_recipes else ""
        )
        logger.info("FSDP gathers the weights%s in %s", layers_in_recipe, precision)


def _listed(layers: Sequence[str], most: int = 8) -> str:
    rest = f", and {len(layers) - most} more" if len(layers) > most else ""
    return ", ".join(layers[:most]) + rest
