"""`ModelSpec`: what the trainer needs to know of a model family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from octavo.config import ConfigError
from octavo.models.loss import ChunkedLoss
from octavo.preflight import model_settings


@dataclass(frozen=True)
class HuggingFace:
    """How a family is stored in Hugging Face's transformers: its `config.json` and its state dict.

    Attributes:
        model_types: the values of `model_type` in `config.json`.
        to_names, from_names: `(state dict, args) -> state dict`, our names and layout to theirs and back.
            They accept any subset of the parameters, on any device. One of ours may be several of theirs,
            which are then converted back together. Tensors without a counterpart (buffers, copies of tied
            weights) are dropped; an unknown name is a `ValueError`.
        to_config, from_config: args to the content of `config.json` and back; `from_config` raises
            `ConfigError` for options that the family does not implement.
        redundant: `(their name, args)` -> what a tensor without a counterpart must equal: another tensor of
            theirs, by name, or values. None: it has no such name, and is refused.
    """

    model_types: tuple[str, ...]
    to_names: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    from_names: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
    to_config: Callable[[Any], dict[str, Any]]
    from_config: Callable[[Mapping[str, Any]], Any]
    redundant: Callable[[str, Any], str | Tensor | None] = lambda name, args: None


@dataclass(frozen=True)
class Pipelined:
    """How a family is split into pipeline stages.

    Attributes:
        units: `args -> units` in the order of computation, each the names of modules that must stay in one
            stage: the embedding, each layer, the head. `ConfigError` for a model that cannot be split.
        width: `args -> D` of the activations `[B, S, D]` that stages send to each other.
    """

    units: Callable[[Any], Sequence[Sequence[str]]]
    width: Callable[[Any], int]


@dataclass(frozen=True)
class Linears:
    """How a family's linear layers relate, by the last parts of their names.

    Attributes:
        same_input: groups of sibling layers that read the same tensor and can share its float8 cast.
        rows: layers that tensor parallelism shards by input features; the others by output features.
    """

    same_input: tuple[tuple[str, ...], ...] = ()
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """One model family. Required: the fields up to `flops_per_token`.

    Attributes:
        name: the value of `model.name`.
        flavors: the values of `model.flavor` -> the family's own arguments (any type, called args below).
        configure: `(args, vocab_size, seq_len in tokens) -> args` adapted to the tokenizer and the sequence
            length. Raises `ConfigError` where they do not fit.
        build: `args -> nn.Module`, called under `torch.device("meta")`.
        parallelize: `(model, Parallelize) -> None`: applies activation checkpointing, compile and sharding in
            place.
        flops_per_token: `(args, model, seq_len) -> float`: forward and backward, without recomputation.

        layer_products: `(args, seq_len) -> (prefix, [(name, FLOPs per token)])`: the matrix products of one
            layer's forward, in order: its linears by their names within the layer, and attention. Layer n is
            the module `prefix + n`. Gives the cost of activation checkpointing; None: unknown.
        mask_documents: `(args, id) -> args` that attend within documents only; a document ends with the token
            `id`. None: `training.document_mask` is refused.
        hugging_face: for `octavo export` and `octavo import`.
        decoder: `(model, capacity in tokens) -> (tokens [B, S] -> logits [B, vocab] after the last token)`,
            with a key/value cache between calls. None: `octavo generate` recomputes every position.
        fuses: whether `parallelize` applies its plan's `fusion`.
        casts_inputs: whether modules with bfloat16 parameters get bfloat16 inputs from the model itself.
            False: FSDP2 casts inputs, so it wraps the model even on a single process.
        chunk_loss: `(model, ChunkedLoss) -> None`: makes the model, when called with `labels_BS`, return the
            summed loss without materialising all logits (`loss.py`). None: not supported.
        pipeline: for pipeline parallelism. Parts of the module may then be absent (None, or missing from a
            ModuleDict), and it is called as `module(h, tokens_BS=tokens)`: h is the tokens in the first stage
            and the previous stage's output in the others.
        linears: for `octavo tune`.
        shared_sizes: `args -> {name: size}` that tensor parallelism splits; its degree must divide each.
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

    def args(self, flavor: str, settings: Sequence[str] = ()) -> Any:
        """The arguments of `flavor`, changed by `settings` (`model.args`); `ConfigError` if there is no such
        flavor, or a setting is wrong.
        """
        if flavor not in self.flavors:
            raise ConfigError(
                f"model.flavor = {flavor!r}: {self.name} has no such flavor; it has: "
                f"{', '.join(self.flavors)}"
            )
        return model_settings.apply(self.flavors[flavor], settings)
