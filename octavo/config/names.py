"""Every name that a config may choose from, so that a config can be checked before torch is imported.

Models, recipes, optimizers and file formats are read where they are defined, which takes no torch. The
registries behind the other names (schedules, corpora) import torch, which takes seconds, so those names are
written twice; a test holds the two equal (`tests/config/test_names.py`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from octavo.config.optimizers import OPTIMIZERS
from octavo.data.file_formats import FORMATS
from octavo.families import FAMILIES
from octavo.float8.recipe import RECIPES as _RECIPES
from octavo.float8.recipe import When

RECIPES: tuple[str, ...] = tuple(_RECIPES)
CONTROLS: tuple[str, ...] = ("unscaled_e5m2",)
"""Recipes that are known to train badly: what a comparison has to find (`octavo compare`)."""

GATHERABLE_RECIPES: tuple[str, ...] = tuple(name for name in RECIPES if _RECIPES[name].gatherable)
"""Recipes whose weights FSDP can gather in float8: one cast serves both products that read the weight."""

PREVIOUS_STEP_RECIPES: tuple[str, ...] = tuple(
    name
    for name in RECIPES
    if any(
        cast is not None and cast.when is When.PREVIOUS_STEP
        for gemm in _RECIPES[name].gemms.values()
        for cast in (gemm.a, gemm.b)
    )
)
"""Recipes that take scales from the step before."""

if TYPE_CHECKING:
    RecipeName = str
    OptimizerName = str
else:
    RecipeName = Literal[(*RECIPES, *CONTROLS)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]
StateDtype = Literal["float32", "bfloat16"]
WeightDtype = Literal["float32", "bfloat16"]
OptimizerImplementation = Literal["for-loop", "foreach", "fused"]
Fuse = Literal["auto", "on", "off"]
DocumentStarts = Literal["auto", "count", "ignore"]
DecayType = Literal["linear", "sqrt", "cosine"]
Converter = Literal["float8"]
CompileComponent = Literal["model", "loss"]
ActivationCheckpointMode = Literal["none", "selective", "full"]
AsyncMode = Literal["disabled", "async", "async_with_pinned_mem"]
Excludable = Literal["optimizer", "dataloader", "train_state"]
CheckpointHash = Literal["crc32", "sha256", "none"]
ExportDtype = Literal["float32", "bfloat16"]
ParamDtype = Literal["auto", "bfloat16", "float32"]
ReduceDtype = Literal["float32", "bfloat16"]
ReshardAfterForward = Literal["default", "always", "never"]
RotateMethod = Literal["auto", "allgather", "alltoall"]
NonFinitePolicy = Literal["stop", "skip", "rewind"]
SpikePolicy = Literal["off", "warn", "skip", "rewind"]

DECAY_TYPES: tuple[str, ...] = get_args(DecayType)

MODELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: tuple(family.flavors) for name, family in FAMILIES.items()}
)
"""Model name -> its flavours."""

DATASETS: tuple[str, ...] = ("shakespeare", "c4", "c4_validation")
"""Corpora known by name; anything else is a local file or folder."""

STREAMED_DATASETS: tuple[str, ...] = ("c4", "c4_validation")
"""The part of `DATASETS` that is fetched, and for which `training.dataset_path` may name a local copy."""

FILE_SUFFIXES: tuple[str, ...] = tuple(suffix for row in FORMATS.values() for suffix in row.suffixes)
"""How the names of a corpus's files end; some may be compressed."""

TOKENIZERS: tuple[str, ...] = ("octavo_bpe_2048",)
"""Tokenizers shipped in the package; anything else is a local folder or file."""
