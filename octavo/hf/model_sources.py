"""Opens a trained model from a checkpoint, the folder of a run, or a Hugging Face folder.

A checkpoint's state contains the run's configuration, and so its model. Two settings in it are not trusted.
The module in `experimental.custom_import` is imported only if the user names it too, because importing runs
code. The tokenizer's path may be from another machine or working directory; if it does not exist, the user
must give one.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from octavo import models
from octavo.checkpoint import DamagedCheckpoint, latest
from octavo.checkpoint.reader import STATE, CheckpointReader, read_state
from octavo.checkpoint.store import find_problems, published_steps, summarize
from octavo.config import ConfigError
from octavo.core.fs import read_json, read_json_object
from octavo.hf import float8_source, safetensors_folder
from octavo.hf.stored_weights import Weights, check_fit, shapes_of
from octavo.tokenizer import Tokenizer, build_tokenizer

_META_FILE = "params.json"
_TRAINING_ARGS = ("max_seq_len", "document_end")
_MOST_PER_TENSOR = 8
"""Parameters of a model per stored tensor: a file may hold several of them in one."""
_MOST_PER_VALUE = 64
"""Values of a model per stored one; beyond it, an error need not name each tensor that does not fit."""


@dataclass(frozen=True)
class ModelSource:
    """A model on disk that has every parameter of `args`'s model in its shape.

    context: the sequence length of its training, in tokens.
    """

    path: Path
    spec: models.ModelSpec
    args: Any
    context: int
    tokenizer: Tokenizer
    weights: Weights

    def build(self, seq_len: int) -> nn.Module:
        """The model for sequences of `seq_len` tokens, on the meta device."""
        return build_on_meta(self.spec, self.spec.configure(self.args, self.tokenizer.vocab_size, seq_len))


def build_on_meta(spec: models.ModelSpec, args: Any, *, most: int | None = None) -> nn.Module:
    """Build the model of `args` on the meta device.

    most: of parameters, where `args` are a stranger's; ConfigError if there are more, or if a size is beyond
    what a tensor can have.
    """
    if most is None:
        with torch.device("meta"):
            return spec.build(args)
    count = 0

    def limit(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ConfigError(f"its sizes ask for more than {most:,} tensors")

    hook = register_module_parameter_registration_hook(limit)
    try:
        return build_on_meta(spec, args)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise ConfigError(f"no model has its sizes ({str(error).splitlines()[0]:.200})") from None
    finally:
        hook.remove()


def open_model(path: Path, *, tokenizer: str | None = None, custom_import: str = "") -> ModelSource:
    """Open the model in `path`: a checkpoint, a run's folder (its newest checkpoint), or a Hugging Face
    folder.

    Args:
        tokenizer: replaces the tokenizer that `path` names.
        custom_import: module that registers the user's model.

    Raises:
        ConfigError: there is no model, it is damaged, or its weights do not fit its configuration.
    """
    models.import_custom(custom_import)
    path = path.expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such folder; name a checkpoint, a run's folder or a Hugging Face folder"
        )
    if safetensors_folder.has_safetensors(path):
        return _open_hf(path, tokenizer)
    if (path / _META_FILE).is_file():
        raise ConfigError(
            f"{path} has Meta's original files; convert them first: octavo import {path} --out FOLDER"
        )
    return _open_checkpoint(find_checkpoint(path), tokenizer, custom_import)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint `path` itself, or the newest that verifies in a folder of checkpoints or of a run."""
    if (path / STATE).is_file():
        if problems := find_problems(path):
            raise DamagedCheckpoint(f"{path} does not verify: {summarize(problems)}")
        return path
    for folder in (path, path / _checkpoint_folder(path)):
        if published_steps(folder):
            return latest(folder)
    raise ConfigError(
        f"{path}: neither a checkpoint (step-N), nor a folder with checkpoints, nor a Hugging Face folder; "
        "to save checkpoints, train with --checkpoint.enable"
    )


def _checkpoint_folder(run: Path) -> str:
    """The name of the folder of checkpoints in a run's folder."""
    try:
        name = read_json(run / "run.json")["config"]["checkpoint"]["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return "checkpoint"
    return name if isinstance(name, str) and name else "checkpoint"


def _open_checkpoint(path: Path, tokenizer: str | None, custom_import: str) -> ModelSource:
    config = read_state(path).get("config")
    try:
        assert isinstance(config, dict)
        name, flavor = config["model"]["name"], config["model"]["flavor"]
        named, required_import = config["model"]["hf_assets_path"], config["experimental"]["custom_import"]
        context = config["training"]["seq_len"]
        settings = config["model"].get("args", [])  # checkpoints from before this option lack it
        assert all(isinstance(text, str) for text in (name, flavor, named, required_import))
        assert isinstance(context, int)
        assert isinstance(settings, list)
    except (AssertionError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: {STATE} lacks the run's configuration, so its model is unknown; continue training from "
            "it and use the checkpoint that this saves"
        ) from None
    if required_import and not custom_import:
        raise ConfigError(
            f"{path}: its model is defined in the module {required_import}. Importing it runs its code; if "
            f"you trust it, add --custom_import {required_import}"
        )
    if not 0 < context < 2**31:
        raise ConfigError(
            f"{path}: {STATE}: training.seq_len is {context}; no run had sequences of that length"
        )
    spec = models.get(name)
    opened = open_tokenizer(tokenizer or named, f"{path} was trained with it")
    args = spec.configure(spec.args(flavor, settings), opened.vocab_size, context)
    expected = shapes_of(build_on_meta(spec, args))
    weights = open_checkpoint_weights(path)
    check_fit(
        weights.shapes,
        expected,
        where=str(path),
        model=f"{name} {flavor} with the tokenizer {opened.source}",
        remedy="Give the tokenizer that it was trained with: --tokenizer PATH",
    )
    return ModelSource(path, spec, args, context, opened, weights)


def open_checkpoint_weights(path: Path) -> Weights:
    """The parameters of a checkpoint's model."""
    reader = CheckpointReader(path)
    return Weights(str(path), reader.model_shapes(), lambda name: reader.read_tensor(f"model.{name}"))


def open_tokenizer(path: str, origin: str) -> Tokenizer:
    """The tokenizer at `path`; the error adds `origin`, where the path is from, and how to give another."""
    try:
        return build_tokenizer(path)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\n  {origin}; if it has moved, give its new path: --tokenizer PATH"
        ) from None


def _open_hf(path: Path, tokenizer: str | None) -> ModelSource:
    spec, args = read_hf_config(path)
    opened = open_tokenizer(tokenizer or str(path), f"{path} should contain it")
    weights = open_hf_weights(path, spec, args, model="the model of its config.json")
    args = spec.configure(args, opened.vocab_size, args.max_seq_len)
    return ModelSource(path, spec, args, args.max_seq_len, opened, weights)


def read_hf_config(path: Path) -> tuple[models.ModelSpec, Any]:
    """The model family and its args from the folder's `config.json`."""
    file = path / "config.json"
    try:
        config = read_json_object(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}; download or export the model again") from None
    except ValueError as error:
        raise ConfigError(
            f"{file}: not a configuration ({error}); download or export the model again"
        ) from None
    known = {
        model_type: spec
        for spec in models.registered().values()
        if spec.hugging_face
        for model_type in spec.hugging_face.model_types
    }
    model_type = config.get("model_type")
    spec = known.get(model_type) if isinstance(model_type, str) else None
    if spec is None:
        raise ConfigError(f"{file}: model_type is {model_type!a:.60}; supported are {', '.join(known)}")
    assert spec.hugging_face is not None
    try:
        return spec, spec.hugging_face.from_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def compare_args(found: Any, expected: Any) -> list[str]:
    """How two models' args differ, except those of training: `rope_theta is 10000.0, not 500000.0`."""
    a, b = dataclasses.asdict(found), dataclasses.asdict(expected)
    return [f"{key} is {a[key]}, not {b[key]}" for key in a if key not in _TRAINING_ARGS and a[key] != b[key]]


def open_hf_weights(
    path: Path, spec: models.ModelSpec, args: Any, *, model: str, remedy: str = ""
) -> Weights:
    """The parameters in a Hugging Face folder, by our names.

    Raises:
        ConfigError: they do not fit the model of `args`, which the message calls `model`; it ends with
        `remedy`.
    """
    hf_format = spec.hugging_face
    assert hf_format is not None
    remedy = remedy or "Download or export the model again"
    stored = safetensors_folder.find_tensors(path)
    try:
        shapes = shapes_of(build_on_meta(spec, args, most=_MOST_PER_TENSOR * len(stored)))
    except ConfigError as error:
        raise ConfigError(f"{path} has {len(stored):,} tensors, but {error}. {remedy}") from None
    asked, held = (
        sum(map(math.prod, of)) for of in (shapes.values(), (one.shape for one in stored.values()))
    )
    if asked > _MOST_PER_VALUE * held:
        raise ConfigError(f"{path} has {held:,} values, but its sizes ask for {asked:,}. {remedy}")
    hf_names: dict[str, list[str]] = {}  # one of ours may be several of theirs
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        theirs = hf_format.to_names({name: torch.empty(shape, device="meta")}, args)
        hf_names[name] = list(theirs)
        expected |= {hf_name: tuple(tensor.shape) for hf_name, tensor in theirs.items()}
    weights = float8_source.without_scales(stored)
    unused = {name: hf_format.redundant(name, args) for name in weights.keys() - expected.keys()}
    redundant = {name: same for name, same in unused.items() if same is not None}
    found = {name: tensor.shape for name, tensor in weights.items() if name not in redundant}
    check_fit(found, expected, where=str(path), model=model, remedy=remedy)
    for name, same in redundant.items():
        if same is not name and not _holds(stored, name, same):
            what = same if isinstance(same, str) else "the values of its config.json"
            raise ConfigError(
                f"{path}: {name} differs from {what}, but the model has only one of them. {remedy}"
            )

    def read(name: str) -> torch.Tensor:
        theirs = {one: float8_source.read_weight(stored, one) for one in hf_names[name]}
        return hf_format.from_names(theirs, args)[name]

    return Weights(str(path), shapes, read)


def _holds(stored: Mapping[str, safetensors_folder.StoredTensor], name: str, same: str | Tensor) -> bool:
    """Whether the stored tensor `name` equals the one called `same`, or roughly the values `same`, which may
    have been stored in half precision.
    """
    if isinstance(same, Tensor):
        found = safetensors_folder.read_tensor(stored[name], name)
        return found.shape == same.shape and torch.allclose(found.float(), same, rtol=1e-2, atol=1e-6)
    if stored[name].shape != stored[same].shape:
        return False
    blocks = (safetensors_folder.row_blocks(stored[one], one) for one in (name, same))
    return all(torch.equal(a.double(), b.double()) for a, b in zip(*blocks, strict=True))
