"""FSDP2's all-gather of weights in float8: a quarter of float32's bytes, half of bfloat16's.

Each rank casts its shard and gathers bytes, instead of gathering high precision and casting the whole weight.
The bits equal those of the ungathered cast under three conditions:

* A block's scale comes from the maximum of the whole block. Shards cut tensors, and 128-blocks, at any row;
  so each rank writes its maxima into the grid of the whole weight's blocks, and one all-reduce(MAX) completes
  the grids (`amax_reduction.py`).
* The cast starts from the dtype that the gathered weight would have had, `mp_policy.param_dtype`. Rounding to
  it is monotonic, so the maximum can be taken first and rounded afterwards.
* One float8 weight serves the output and grad_input: `Recipe.gatherable`.

FSDP2 calls two hooks on the local tensor of its sharded parameter. So that tensor is a `ShardedWeight`: the
plain tensor (same storage), the cast, and a `ShardCache` of maxima and casts. `Float8Linear` creates it when
FSDP2 sets the sharded parameter. Before that, and in state dicts and optimizer states, tensors are plain.

The cache must not outlive the values. The tensor subclass sees every operation that writes to it, by an
optimizer, a load, or by hand, and clears the cache; a version counter is not enough, since fused optimizers
do not advance it. A write through an alias bypasses the subclass, but advances the version; that is an error,
because noticing it on some ranks only and reducing again there would hang the others.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only

from octavo.float8.distributed.fsdp_shards import ShardLayout, cast_shard, reduce_maxima, shard_amax
from octavo.float8.distributed.unsharded_weight import UnshardedWeight
from octavo.float8.recipe import FULL, Cast

_aten = torch.ops.aten
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# -------------------------------------------------------------------------------------- the sharded parameter


@dataclass
class ShardCache:
    """The maxima and casts of a shard's current values. Shared by a `ShardedWeight` and its views.

    amax: the whole weight's block maxima. version: the tensor's version when they were computed. casts:
    results of `cast_shard` by dtype, kept while `keep_casts`. layout: from FSDP2's last gather, for weights
    sharded along two mesh axes.
    """

    amax: Tensor | None = None
    version: int | None = None
    keep_casts: bool = False
    casts: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)
    layout: ShardLayout | None = None

    def clear(self) -> None:
        self.amax = None
        self.casts.clear()


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


_written_arguments: dict[Any, tuple[tuple[int, str], ...]] = {}


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that `func` writes to."""
    places = _written_arguments.get(func)
    if places is None:
        places = _written_arguments[func] = tuple(
            (i, a.name)
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        )
    for i, name in places:
        value = args[i] if i < len(args) else kwargs.get(name)
        yield from value if isinstance(value, (list, tuple)) else (value,)


HOOKS = "float8_gather_hooks"
"""Attribute for the hooks of a shard that cannot be a `ShardedWeight`, e.g. a fake tensor."""


class Float8GatherHooks:
    """The hooks that FSDP2 calls to gather the shard `plain` in float8, cast by `cast`."""

    plain: Tensor
    cast: Cast
    cache: ShardCache

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: Any,
    ) -> tuple[tuple[Tensor], Any]:
        """This rank's bytes to gather, and metadata for `fsdp_post_all_gather`."""
        N, K = outer_size
        dim = int(self.plain.shape[1] != K)
        layout = ShardLayout(N, K, dim, mesh.size(), mesh.get_local_rank())
        dtype = mp_policy.param_dtype or self.plain.dtype
        if not getattr(module, "gathers_float8", False):
            # A weight shared with another module, under whose name FSDP2 gathers it.
            padded = self.plain.new_zeros(layout.padded, dtype=dtype)
            rows, cols = self.plain.shape
            padded.narrow(0, 0, rows).narrow(1, 0, cols).copy_(self.plain)
            return (padded,), (layout, None)
        cache = self.cache
        if cache.layout is None:
            _refuse_smaller_groups(module)
        cache.layout = layout
        self.check_unwritten()
        if dtype in cache.casts:
            data, scale = cache.casts[dtype]
            return (data,), (layout, scale)
        amax = cache.amax
        if amax is None or amax.shape != layout.grid(self.cast):
            groups = [mesh.get_group(), *_tensor_parallel_groups(module.weight, self.cast, mesh)]
            (amax,) = reduce_maxima([shard_amax(self.plain, layout, self.cast)], groups)
        data, scale = cast_shard(self.plain.to(dtype), amax.to(self.plain.device), layout, self.cast)
        if cache.keep_casts:
            cache.amax, cache.version = amax, _version(self.plain)
            cache.casts[dtype] = data, scale
        return (data,), (layout, scale)

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight, a view of the gathered bytes; FSDP2 frees and refills their storage."""
        layout, scale = metadata
        if scale is not None and scale.is_cuda:  # made in FSDP2's stream, read in this one
            scale.record_stream(torch.cuda.current_stream())
        if out is not None:
            if scale is not None:
                # Not written in place: autograd saved the old scale in forward for backward.
                weight = out._local_tensor if isinstance(out, DTensor) else out
                assert isinstance(weight, UnshardedWeight)
                weight.scale = scale
            return None
        (gathered,) = outputs
        if scale is not None:
            gathered = gathered.view(self.cast.dtype)
        whole = gathered.flatten()[: layout.N * layout.K].view(layout.N, layout.K)
        return (whole if scale is None else UnshardedWeight(whole, scale, param_dtype, self.cast)), ()

    def check_unwritten(self) -> None:
        """Raise RuntimeError if the shard was written to without clearing the cache."""
        cache = self.cache
        if (cache.amax is not None or cache.casts) and cache.version != _version(self.plain):
            raise RuntimeError(
                "a float8 weight was written through an alias of its shard after its scales had been "
                "computed. Write through the parameter or load_state_dict, or call "
                "precompute_float8_dynamic_scale_for_fsdp(model) after the write"
            )


class ShardedWeight(Float8GatherHooks, Tensor):
    """One rank's shard of a weight that FSDP2 gathers in float8, cast by `cast`.

    It shares the storage of the plain tensor `plain`. Operations return plain tensors, except those with
    which FSDP2 and `nn.Module` create new shards (padding, slicing, moving to a device, `to_empty`). It
    pickles as `plain`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, plain: Tensor, cast: Cast, cache: ShardCache | None = None) -> ShardedWeight:
        weight = torch.Tensor._make_subclass(cls, plain)  # type: ignore[attr-defined]
        weight.plain, weight.cast, weight.cache = plain, cast, cache or ShardCache()
        return weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedWeight({self.plain!r}, cast={self.cast})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedWeight:
        copied = memo[id(self)] = ShardedWeight(self.plain.detach().clone(), self.cast)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = [t for t in _written(func, args, kwargs) if isinstance(t, ShardedWeight)]
        for weight in written:
            weight.cache.clear()
        unwrap = lambda tree: tree_map_only(ShardedWeight, lambda t: t.plain, tree)  # noqa: E731
        out = func(*unwrap(args), **unwrap(kwargs))
        if not isinstance(out, Tensor) or not isinstance(args[0], ShardedWeight):
            return out
        weight = args[0]
        if out is weight.plain:  # written in place
            return weight
        if isinstance(out, FakeTensor):  # cannot be a subclass; see `checks/fake_gpu.py`
            return out
        if out.dim() == 2 and func in _RELAYOUTS:
            return ShardedWeight(out, weight.cast, weight.cache)
        if out.dim() == 2 and func in _COPIES:
            same_values = func is _aten._to_copy.default and out.dtype == weight.dtype
            return ShardedWeight(out, weight.cast, weight.cache if same_values else None)
        return out


def fsdp_parameters(modules: Container[nn.Module]) -> Iterator[tuple[Any, Any]]:
    """FSDP2's records of the parameters of `modules`: (parameter group, parameter).

    They are private to PyTorch: if their structure is not the expected one, nothing is returned.
    """
    for reference in list(_module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in getattr(group, "fsdp_params", ()):
                if parameter._module_info.module in modules:
                    yield group, parameter


def _refuse_smaller_groups(module: nn.Module) -> None:
    """Raise ValueError if FSDP2 would reshard `module` to a subset of its ranks after forward.

    FSDP2 would fail later, with a message about dtypes.
    """
    if any(getattr(group, "_use_post_forward_mesh", False) for group, _ in fsdp_parameters([module])):
        raise ValueError(
            "reshard_after_forward is a number of ranks; FSDP2 cannot reshard weights that it "
            "gathers in float8 to fewer ranks. Use reshard_after_forward=True or False, or gather in "
            "high precision: enable_fsdp_float8_all_gather=False"
        )


_RELAYOUTS = frozenset(
    {
        _aten.detach.default,
        _aten.alias.default,
        _aten.view.default,
        _aten.slice.Tensor,
        _aten.as_strided.default,
    }
)
_COPIES = frozenset(
    {
        _aten.new_zeros.default,
        _aten.empty_like.default,
        _aten._to_copy.default,
        _aten._pin_memory.default,
    }
)


def _is_whole(placement: Any) -> bool:
    return bool(placement.is_replicate())


def _tensor_parallel_groups(weight: Any, cast: Cast, mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """The groups, besides that of FSDP2's `mesh`, over which one block of the sharded `weight` is spread.

    A 128-block does not cross from one tensor parallel shard to another.
    """
    if not isinstance(weight, DTensor) or cast.block[0] != FULL:
        return []
    return [group for group in _sharding_groups(weight) if group is not mesh.get_group()]


def _sharding_groups(weight: DTensor) -> list[dist.ProcessGroup]:
    axes = [axis for axis, placement in enumerate(weight.placements) if not _is_whole(placement)]
    return [weight.device_mesh.get_group(axis) for axis in axes]


def shard_in_float8(parameter: DTensor, cast: Cast, *, previous: Any) -> None:
    """Make the local tensor of FSDP2's sharded `parameter` a `ShardedWeight`.

    Does nothing if it already is one, if it is the gathered weight, or if the parameter is on the mesh of the
    `previous` parameter, which is then sharded by tensor parallelism only.
    """
    if type(parameter._local_tensor) is not Tensor or parameter.dtype not in _DTYPES:
        return
    sharded_before = isinstance(previous, DTensor) and type(previous._local_tensor) is Tensor
    if sharded_before and previous.device_mesh == parameter.device_mesh:
        return
    parameter._local_tensor = ShardedWeight(parameter._local_tensor, cast)


def plain_parameter(tensor: Any) -> Any:
    """`tensor` with the plain tensor in place of a `ShardedWeight`, for a state dict."""
    if isinstance(tensor, DTensor) and isinstance(tensor._local_tensor, ShardedWeight):
        return DTensor.from_local(
            tensor._local_tensor.plain,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    return tensor


# -------------------------------------------------------------------------------- all scales in one reduction


def sharded_weights(module: nn.Module) -> list[tuple[DTensor, Float8GatherHooks]]:
    """The parameters in `module` that FSDP2 gathers in float8 and that are sharded now, with their hooks."""
    locals_ = [(p, p._local_tensor) for p in module.parameters() if isinstance(p, DTensor)]
    found = [(p, t if isinstance(t, Float8GatherHooks) else getattr(t, HOOKS, None)) for p, t in locals_]
    return [(p, hooks) for p, hooks in found if hooks is not None]


def _layout_of(parameter: DTensor, weight: Float8GatherHooks) -> ShardLayout | None:
    """The layout of FSDP2's last gather, or that of a parameter sharded along at most one mesh axis."""
    if weight.cache.layout is not None:
        return weight.cache.layout
    axes = [axis for axis, placement in enumerate(parameter.placements) if not _is_whole(placement)]
    N, K = parameter.shape
    if not axes:
        return ShardLayout(N, K, 0, 1, 0)
    placement = parameter.placements[axes[0]]
    if len(axes) > 1 or not isinstance(placement, Shard):
        return None
    mesh = parameter.device_mesh
    return ShardLayout(N, K, placement.dim, mesh.size(axes[0]), mesh.get_local_rank(axes[0]))


@torch.no_grad()
def precompute_float8_dynamic_scale_for_fsdp(module: nn.Module) -> None:
    """Compute the scales of all weights in `module` that FSDP2 gathers in float8, in one all-reduce.

    Call it on every rank after `optimizer.step()`. Gathers then need no reduction of their own; results are
    the same with and without. The scales are valid until the weights are next written to. Later gathers
    compute their own, so a missing call costs only time. Writing through an alias of a parameter's storage
    raises RuntimeError at the next gather.

    Weights sharded over different meshes, or by tensor parallelism too, take one all-reduce per set of
    meshes. Does nothing for a module without such weights.
    """
    by_groups: dict[tuple[int, ...], tuple[list[dist.ProcessGroup], list[Any]]] = {}
    for parameter, weight in sharded_weights(module):
        layout = _layout_of(parameter, weight)
        if layout is None:
            continue
        groups = _sharding_groups(parameter)
        if weight.cast.block[0] != FULL and len(groups) > 1:
            groups = groups[:1]  # FSDP2's axis comes before tensor parallel's
        key = tuple(id(group) for group in groups)
        by_groups.setdefault(key, (groups, []))[1].append((weight, layout))
    for groups, entries in by_groups.values():
        grids = [shard_amax(weight.plain, layout, weight.cast) for weight, layout in entries]
        for (weight, _), amax in zip(entries, reduce_maxima(grids, groups), strict=True):
            weight.cache.clear()
            weight.cache.amax, weight.cache.version = amax, _version(weight.plain)


class cast_shards_once:
    """Scope in which each shard in `module` is cast once, when first gathered, after one all-reduce."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.caches: list[ShardCache] = []

    def __enter__(self) -> None:
        weights = sharded_weights(self.module)
        for _, weight in weights:
            weight.check_unwritten()
        if any(weight.cache.amax is None for _, weight in weights):
            precompute_float8_dynamic_scale_for_fsdp(self.module)
        self.caches = [weight.cache for _, weight in weights]
        for cache in self.caches:
            cache.keep_casts = True

    def __exit__(self, *exception: object) -> None:
        for cache in self.caches:
            cache.keep_casts = False
            cache.casts.clear()
        self.caches = []
