"""Opens what can be read as a trained model: a checkpoint, the folder of a run, a Hugging Face folder.

A checkpoint tells which model it is of: its state holds the run's whole configuration. Two things of that
configuration are not followed blindly. A module named by `experimental.custom_import` is imported only where
the user names it too, for importing runs code. A tokenizer's path was written on another machine, perhaps
from another folder; where it leads nowhere, the user is asked.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from octavo import models
from octavo.checkpoint import DamagedCheckpoint, latest
from octavo.checkpoint.reader import STATE, CheckpointReader, read_state
from octavo.checkpoint.store import find_problems, published_steps, summarize
from octavo.config import ConfigError
from octavo.hf import safetensors_folder
from octavo.hf.stored_weights import Weights, check_fit, shapes_of
from octavo.tokenizer import Tokenizer, build_tokenizer

_META_FILE = "params.json"
_OF_TRAINING = ("max_seq_len", "document_end")


@dataclass(frozen=True)
class ModelSource:
    """A model on disk that was found to be whole: every parameter of `args`'s model is there, in its shape.

    context: the longest sequence, in tokens, that it was trained on.
    """

    path: Path
    spec: models.ModelSpec
    args: Any
    context: int
    tokenizer: Tokenizer
    weights: Weights

    def build(self, seq_len: int) -> nn.Module:
        """The model for sequences of `seq_len` tokens, on the meta device."""
        return build(self.spec, self.spec.configure(self.args, self.tokenizer.vocab_size, seq_len))


def build(spec: models.ModelSpec, args: Any) -> nn.Module:
    """The model of `args` on the meta device."""
    with torch.device("meta"):
        return spec.build(args)


def open_source(path: Path, *, tokenizer: str | None = None, custom_import: str = "") -> ModelSource:
    """The model in `path`: a checkpoint's folder, a run's (its newest checkpoint), or a Hugging Face folder.

    `tokenizer` is used in place of the one that is named there; `custom_import` registers a model of the
    user's own.

    Raises:
        ConfigError: there is none, it is damaged, or it does not fit the model it says it is of.
    """
    models.import_custom(custom_import)
    path = path.expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such folder; name a checkpoint, a run's folder or a Hugging Face folder"
        )
    if safetensors_folder.is_folder(path):
        return _open_hf(path, tokenizer)
    if (path / _META_FILE).is_file():
        raise ConfigError(
            f"{path} holds Meta's original files: octavo import {path} --out FOLDER, and use that"
        )
    return _open_checkpoint(find_checkpoint(path), tokenizer, custom_import)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint in `path`: `path` itself, or the newest that verifies in it or in its `checkpoint`."""
    if (path / STATE).is_file():
        if problems := find_problems(path):
            raise DamagedCheckpoint(f"{path} does not verify: {summarize(problems)}")
        return path
    for folder in (path, path / _checkpoint_folder(path)):
        if published_steps(folder):
            return latest(folder)
    raise ConfigError(
        f"{path}: neither a checkpoint (step-N), nor a folder with some, nor a Hugging Face folder; runs "
        "save checkpoints with --checkpoint.enable"
    )


def _checkpoint_folder(run: Path) -> str:
    """Where the run that wrote into `run` keeps its checkpoints."""
    try:
        name = json.loads((run / "run.json").read_bytes())["config"]["checkpoint"]["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return "checkpoint"
    return name if isinstance(name, str) and name else "checkpoint"


def _open_checkpoint(path: Path, tokenizer: str | None, custom_import: str) -> ModelSource:
    config = read_state(path).get("config")
    try:
        assert isinstance(config, dict)
        name, flavor = config["model"]["name"], config["model"]["flavor"]
        named, needs = config["model"]["hf_assets_path"], config["experimental"]["custom_import"]
        context = config["training"]["seq_len"]
        assert all(isinstance(text, str) for text in (name, flavor, named, needs))
        assert isinstance(context, int)
    except (AssertionError, KeyError, TypeError):
        raise ConfigError(
            f"{path}: its {STATE} has no configuration of the run, so it does not tell which model it is of; "
            "train on from it with this version, and use the checkpoint that that saves"
        ) from None
    if needs and not custom_import:
        raise ConfigError(
            f"{path}: its model comes from the module {needs}. Importing a module runs it, so say that you "
            f"trust it: --custom_import {needs}"
        )
    spec = models.get(name)
    tokens = open_tokenizer(tokenizer or named, f"{path} was trained with it")
    args = spec.configure(spec.args(flavor), tokens.vocab_size, context)
    expected = shapes_of(build(spec, args))
    weights = checkpoint_weights(path)
    check_fit(
        weights.shapes,
        expected,
        where=str(path),
        model=f"{name} {flavor} with the tokenizer {tokens.source}",
        remedy="Name the tokenizer that it was trained with: --tokenizer PATH",
    )
    return ModelSource(path, spec, args, context, tokens, weights)


def checkpoint_weights(path: Path) -> Weights:
    """The parameters in a checkpoint."""
    reader = CheckpointReader(path)
    shapes = {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in reader.metadata.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    return Weights(str(path), shapes, lambda name: reader.read_tensor(f"model.{name}"))


def open_tokenizer(path: str, whose: str) -> Tokenizer:
    """The tokenizer at `path`, or an error that says whose it is and how to name another."""
    try:
        return build_tokenizer(path)
    except ConfigError as error:
        raise ConfigError(f"{error}\n  {whose}; if it is elsewhere now: --tokenizer PATH") from None


def _open_hf(path: Path, tokenizer: str | None) -> ModelSource:
    spec, args = hf_model(path)
    tokens = open_tokenizer(tokenizer or str(path), "the folder has no other")
    weights = hf_weights(path, spec, args, model="the model of its config.json")
    args = spec.configure(args, tokens.vocab_size, args.max_seq_len)
    return ModelSource(path, spec, args, args.max_seq_len, tokens, weights)


def hf_model(path: Path) -> tuple[models.ModelSpec, Any]:
    """The family and the sizes that the folder's `config.json` tells."""
    config = read_json(path / "config.json")
    known = {spec.hugging_face.model_type: spec for spec in models.registered().values() if spec.hugging_face}
    spec = known.get(config.get("model_type", ""))
    if spec is None:
        raise ConfigError(
            f"{path / 'config.json'}: model_type is {config.get('model_type')!r}; octavo knows "
            f"{', '.join(known)}"
        )
    assert spec.hugging_face is not None
    try:
        return spec, spec.hugging_face.from_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object in `path`; `ConfigError` if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; fetch or export the model again") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no JSON ({error}); fetch or export the model again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: no JSON object; fetch or export the model again")
    return value


def differences(found: Any, expected: Any) -> list[str]:
    """How two models' args differ, beside what training chooses: `rope_theta is 10000.0, not 500000.0`."""
    a, b = dataclasses.asdict(found), dataclasses.asdict(expected)
    return [f"{key} is {a[key]}, not {b[key]}" for key in a if key not in _OF_TRAINING and a[key] != b[key]]


def hf_weights(path: Path, spec: models.ModelSpec, args: Any, *, model: str, remedy: str = "") -> Weights:
    """The parameters in a Hugging Face folder, by our names, found to fit the model of `args`.

    Raises:
        ConfigError: they do not; the message calls `args`'s model `model`, and ends in `remedy`.
    """
    form = spec.hugging_face
    assert form is not None
    shapes = shapes_of(build(spec, args))
    theirs, expected = {}, {}
    for name, shape in shapes.items():
        ((their_name, tensor),) = form.to_names({name: torch.empty(shape, device="meta")}, args).items()
        theirs[name], expected[their_name] = their_name, tuple(tensor.shape)
    stored = safetensors_folder.tensors(path)
    found = {
        name: one.shape
        for name, one in stored.items()
        if name in expected or not _carries_nothing(form, name, args)
    }
    check_fit(
        found, expected, where=str(path), model=model, remedy=remedy or "Fetch or export the model again"
    )

    def read(name: str) -> torch.Tensor:
        tensor = safetensors_folder.read(stored[theirs[name]], theirs[name])
        return form.from_names({theirs[name]: tensor}, args)[name]

    return Weights(str(path), shapes, read)


def _carries_nothing(form: models.HuggingFace, name: str, args: Any) -> bool:
    """Whether the family knows the name and leaves it out: a buffer, or a copy of tied embeddings."""
    try:
        return not form.from_names({name: torch.empty(2 * args.head_dim, 1, device="meta")}, args)
    except (AttributeError, RuntimeError, ValueError):
        return False
