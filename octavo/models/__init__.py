"""The model registry: what the trainer needs to know of a model, and which models there are.

A model that lives outside this package joins by calling `register` in a module named by
`experimental.custom_import` (`docs/your_own_model.md`). The trainer never looks inside a model; it uses the
five functions of a `ModelSpec`.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from octavo.config import ConfigError
from octavo.models.loss import ChunkedLoss


@dataclass(frozen=True)
class HuggingFace:
    """A family's form in Hugging Face's transformers: what its models are called there, and how they are laid
    out.

    model_type: what `config.json` says. to_names, from_names: `(tensors by name, args) -> tensors by name`,
    from ours to theirs and back; called with any subset of the parameters, on any device. A name that is left
    out carries nothing; one that is not known is a `ValueError`. to_config, from_config: args to the content
    of `config.json` and back; `ConfigError` for what the family does not compute.
    """

    model_type: str
    to_names: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    from_names: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    to_config: Callable[[Any], dict[str, Any]]
    from_config: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Pipelined:
    """How models of a family are cut into pipeline stages.

    units: `args -> what is never cut`, in the order of computation, each the names of its modules: first the
    embedding, then each layer, last the head. `ConfigError` for a model that cannot be cut. width: `args ->`
    the features of what a stage hands on to the next, `[B, S, width]`.
    """

    units: Callable[[Any], Sequence[Sequence[str]]]
    width: Callable[[Any], int]


@dataclass(frozen=True)
class Linears:
    """What the linear layers of a family are to each other, by the last parts of their names.

    same_input: groups of siblings that read one tensor, and so can share its casts. rows: those whose inputs
    tensor parallelism shards; of the others it shards the outputs.
    """

    same_input: tuple[tuple[str, ...], ...] = ()
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """One family of models.

    name: what `model.name` says.
    flavors: what `model.flavor` may say -> the family's own arguments (any type).
    configure: `(args, vocab_size, seq_len) -> args`, the arguments made to fit the tokenizer (its number of
    tokens) and
        the sequence length in tokens. Raises `ConfigError` where they cannot fit.
    build: `args -> nn.Module`, called under `torch.device("meta")`. The module maps tokens [B, S] (int64)
    to logits
        [B, S, vocab], and has `init_rule(parameter name) -> InitRule`; `init_buffers()` is called if it has
        one.
    parallelize: `(model, Parallelize) -> None`, applies checkpointing, compile and sharding in place.
    flops_per_token: `(args, model, seq_len) -> float`, forward and backward, without recomputation.
    layer_products: `(args, seq_len) -> (prefix, [(name, FLOPs)])`, what a layer multiplies in forward, in
    order: its linears by their names within the layer, and one more, attention, with FLOPs per token. Layer n
    is the module `prefix + n`. From it follows what activation checkpointing computes again; None: unknown.
    mask_documents: `(args, id) -> args`, made to attend within documents, which end with the token `id`; None
    where the
        model cannot.
    hugging_face: what `octavo export` and `octavo import` need, or None.
    decoder: `(model, capacity in tokens) -> (tokens [B, S] -> logits [B, vocab] after the last)`, which keeps
    what it has seen from call to call; None: `octavo generate` computes every position anew.
    fuses: whether `parallelize` follows its plan's `fusion`.
    casts_inputs: whether modules whose parameters are bfloat16 need no help to get inputs that fit. False:
    FSDP2 casts inputs, too, and so is used even by a single process.
    chunk_loss: `(model, ChunkedLoss) -> None`, makes the model, called with `labels_BS` as well, return their
    summed loss without ever having all logits (`components/chunked_loss.py`); None where it cannot.
    pipeline: for pipeline parallelism, or None. The module's parts may then be absent (None, or missing from
        a ModuleDict); it is called as `module(h, tokens_BS=tokens)`, h being the tokens in the first stage
        and what the stage before returned in others.
    linears: what `octavo tune` needs to know of its linear layers.
    shared_sizes: `args -> name -> size`, what tensor parallelism shares, so that its degree must divide each.
    """

    name: str
    flavors: Mapping[str, Any]
    configure: Callable[[Any, int, int], Any]
    build: Callable[[Any], nn.Module]
    parallelize: Callable[[nn.Module, Any], None]
    flops_per_token: Callable[[Any, nn.Module, int], float]
    layer_products: Callable[[Any, int], tuple[str, Sequence[tuple[str, float]]]] | None = None
    mask_documents: Callable[[Any, int], Any] | None = None
    hugging_face: HuggingFace | None = None
    decoder: Callable[[nn.Module, int], Callable[[Tensor], Tensor]] | None = None
    fuses: bool = False
    casts_inputs: bool = False
    chunk_loss: Callable[[nn.Module, ChunkedLoss], None] | None = None
    pipeline: Pipelined | None = None
    linears: Linears = Linears()
    shared_sizes: Callable[[Any], Mapping[str, int]] = lambda args: {}

    def args(self, flavor: str) -> Any:
        """The arguments of `flavor`; `ConfigError` if there is no such flavor."""
        try:
            return self.flavors[flavor]
        except KeyError:
            known = ", ".join(self.flavors)
            raise ConfigError(
                f"model.flavor = {flavor!r}: {self.name} has no such flavor; it has: {known}"
            ) from None


_SPECS: dict[str, ModelSpec] = {}


def register(spec: ModelSpec) -> None:
    """Add a model to the registry; a second spec of the same name is a `ValueError`."""
    if spec.name in _SPECS:
        raise ValueError(f"a model named {spec.name!r} is registered already; give yours another name")
    _SPECS[spec.name] = spec


def import_custom(module: str, name: str | None = None) -> None:
    """Import the user's `module`, which registers a model, from Python's path or the working directory; "" is
    none. What it raises says which option asked for it.

    Raises:
        ConfigError: it ends Python, or registers no model called `name`.
    """
    if not module:
        return
    told = f"experimental.custom_import = {module}"
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except SystemExit as error:
        raise ConfigError(
            f"{told}: this module calls sys.exit when it is imported; leave that to "
            'what runs under if __name__ == "__main__"'
        ) from error
    except Exception as error:
        error.add_note(f"octavo: raised by {told}")
        raise
    if name is not None and name not in _SPECS:
        raise ConfigError(
            f"model.name = {name!r}: {told} registers no such model (octavo.models.register); "
            f"known: {', '.join(_SPECS)}"
        )


def get(name: str) -> ModelSpec:
    """The spec called `name`; `ConfigError` if nothing registered it."""
    try:
        return _SPECS[name]
    except KeyError:
        known = ", ".join(_SPECS)
        raise ConfigError(
            f"model.name = {name!r}: no such model; known: {known}. "
            "A model of your own is registered by the module that experimental.custom_import names"
        ) from None


def registered() -> Mapping[str, ModelSpec]:
    """All registered specs by name."""
    return dict(_SPECS)


from octavo.models import llama3  # noqa: E402  registers itself; last, because it needs the names above

__all__ = ["HuggingFace", "Linears", "ModelSpec", "Pipelined", "get", "llama3", "register", "registered"]
