"""What a resumed job has that the job of its checkpoint had not: one sentence per change.

Other text, another tokenizer or another model make the run another run, which is refused unless
`checkpoint.allow_changed` is set. Other changes bend the loss curve, and are warnings. Options that
change no loss (the layout, compile, metrics) are not mentioned.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.config import JobConfig
from octavo.config.parallel_dims import ParallelDims
from octavo.train import quantization
from octavo.train.step import global_batch_size

_ROUNDS = "numbers are rounded differently from now on"
_CASTS = "float8 layers round differently from now on"
_UPDATES = "later updates use the new value"
_SCHEDULE = "later steps follow the new schedule"
_VALIDATES = "validation losses cannot be compared with the earlier ones"

EFFECTS: Mapping[str, str] = {
    "optimizer.name": "another rule updates the weights from now on",
    "optimizer.lr": "later steps take the new learning rate",
    "optimizer.beta1": _UPDATES,
    "optimizer.beta2": _UPDATES,
    "optimizer.eps": _UPDATES,
    "optimizer.weight_decay": _UPDATES,
    "optimizer.state_dtype": "the optimizer's moments are kept in another precision",
    "lr_scheduler.warmup_steps": _SCHEDULE,
    "lr_scheduler.decay_ratio": _SCHEDULE,
    "lr_scheduler.decay_type": _SCHEDULE,
    "lr_scheduler.min_lr_factor": _SCHEDULE,
    "training.max_norm": "later gradients are clipped at the new norm",
    "training.document_mask": "attention reaches other tokens than it did",
    "training.document_starts": "the loss counts other labels than it did",
    "training.dtype": _ROUNDS,
    "training.mixed_precision_param": _ROUNDS,
    "training.mixed_precision_reduce": _ROUNDS,
    "training.seq_len": "samples are cut anew, so some text is read twice and some never",
    "float8.filter_fqns": _CASTS,
    "float8.layer_recipes": _CASTS,
    "float8.layer_recipes_file": _CASTS,
    "float8.emulate": _CASTS,
    "float8.share_scales": _CASTS,
    "float8.enable_fsdp_float8_all_gather": _CASTS,
    "float8.max_saturated": _CASTS,
    "validation.dataset": _VALIDATES,
    "validation.dataset_path": _VALIDATES,
    "validation.seq_len": _VALIDATES,
    "validation.steps": _VALIDATES,
    "experimental.custom_import": "the model and hooks may come from other code",
}
"""Option -> what a change of it does to a resumed run, where that depends on nothing else."""


@dataclass(frozen=True)
class Change:
    """what: an option or a fact about the run. effect: what the change does."""

    what: str
    was: object
    now: object
    effect: str

    def __str__(self) -> str:
        return f"{self.what} was {_shown(self.was)}, is {_shown(self.now)}: {self.effect}"


@dataclass(frozen=True)
class JobIdentity:
    """A job and what is known of it once it is built.

    layout: its parallel degrees. data: the identity of its training text. tokenizer: its fingerprint.
    precision: the dtype that the model computes in. schedule: what the learning rate depends on.
    """

    job: JobConfig
    layout: ParallelDims
    data: Mapping[str, Any]
    tokenizer: str
    precision: str
    schedule: Mapping[str, Any]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps for the comparison, beside config, layout and data."""
        return {"tokenizer": self.tokenizer, "precision": self.precision, "schedule": self.schedule}


def other_run(state: Mapping[str, Any], now: JobIdentity) -> list[Change]:
    """The changes that make `now` another run than that of the checkpoint with `state`."""
    was, job = _Saved(state), now.job
    found = [
        Change(f"model.{key}", was[f"model.{key}"], value, "the weights are used in another architecture")
        for key, value in (
            ("name", job.model.name),
            ("flavor", job.model.flavor),
            ("args", job.model.args),
        )
        if was.differs(f"model.{key}", value)
    ]
    tokenizer = job.model.hf_assets_path
    if state.get("tokenizer", now.tokenizer) != now.tokenizer:
        effect = "token ids mean other text than the model has learned"
        return [*found, Change("model.hf_assets_path", was["model.hf_assets_path"], tokenizer, effect)]
    if "data" in state and (change := _other_text(state["data"].get("identity", {}), was, now)):
        found.append(change)
    return found


def _other_text(saved: Mapping[str, Any], was: "_Saved", now: JobIdentity) -> Change | None:
    """The change of the training text, found by its content; by its name where it is streamed."""
    effect = "training continues at the same position of the new text"
    training, before, here = now.job.training, _content(saved), _content(now.data)
    names = [("training.dataset", training.dataset), ("training.dataset_path", training.dataset_path)]
    renamed = [
        (key, name) for key, name in names if was.differs(key, name) and not _same_path(was[key], name)
    ]
    by_name = all("files" in key for key in here) and renamed
    if not before or (before == here and not by_name):  # an older checkpoint does not know its text
        return None
    if renamed:
        key, name = renamed[0]
        return Change(key, was[key], name, effect)
    tokens = [sum(n for key, n in one.items() if key.endswith("tokens")) for one in (before, here)]
    if all(tokens) and tokens[0] != tokens[1]:
        before_here = f"{tokens[0]:,} tokens", f"{tokens[1]:,}"
        return Change("the text of training.dataset", *before_here, effect)
    return Change("the text of training.dataset", "another", "of the same size", effect)


def _content(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What identifies the text itself, out of a source's identity."""
    kinds = ("tokens", "crc32", "sha256", "files")
    return {key: value for key, value in identity.items() if key.rpartition(".")[2] in kinds}


def _same_path(was: object, now: object) -> bool:
    if not isinstance(was, str) or not isinstance(now, str):
        return was == now
    return Path(was).expanduser().resolve() == Path(now).expanduser().resolve()


def changes(state: Mapping[str, Any], now: JobIdentity) -> Iterator[Change]:
    """The other changes since the checkpoint with `state` that change the loss."""
    was, job = _Saved(state), now.job
    recipes = was.recipe, quantization.recipe_name(job.model.converters, job.float8)
    if was.config and recipes[0] != recipes[1]:
        shown = recipes[0] or "high precision", recipes[1] or "high precision"
        yield Change(
            "the recipe (float8.recipe_name)", *shown, "matrix products round differently from now on"
        )
    samples = was.global_batch_size(), global_batch_size(job.training, now.layout)
    if samples[0] is not None and samples[0] != samples[1]:
        effect = "a step averages over another number of samples, at the same learning rate"
        yield Change("the global batch size (training.global_batch_size)", *samples, effect)
    yield from _order(state, now)
    for key, effect in EFFECTS.items():
        section, value = key.partition(".")[0], job.get(key)
        if section == "float8" and None in recipes:
            continue
        if section == "validation" and not (job.validation.enable and was["validation.enable"]):
            continue
        if was.differs(key, value):
            yield Change(key, was[key], value, effect)
    saved = state.get("schedule", {})
    if saved.get("steps") != now.schedule["steps"] and None not in (
        saved.get("steps"),
        now.schedule["steps"],
    ):
        effect = "the learning rate decays towards another last step"
        yield Change(
            "the length of the schedule (training.steps)", saved["steps"], now.schedule["steps"], effect
        )
    if state.get("precision", now.precision) != now.precision and not was.differs(
        "training.mixed_precision_param", job.training.mixed_precision_param
    ):
        yield Change("high precision", state["precision"], now.precision, _ROUNDS)


def _order(state: Mapping[str, Any], now: JobIdentity) -> Iterator[Change]:
    """Changes of the order in which the same text is read."""
    saved = state.get("data", {}).get("identity", {})
    if not saved:
        return
    again = "so some text is read twice and some never"
    words = {
        "seed": ("the order of the data (training.data_seed)", f"samples come in another order, {again}"),
        "held_out": ("the held-out text (validation.fraction)", "some of it was trained on, or the reverse"),
        "slots": ("the shares of training.dataset", f"sources are mixed in other shares, {again}"),
    }
    for kind, (what, effect) in words.items():
        pairs = [
            (saved.get(key), now.data.get(key))
            for key in dict.fromkeys([*saved, *now.data])
            if key.rpartition(".")[2] == kind and saved.get(key) != now.data.get(key)
        ]
        if pairs:
            yield Change(what, *pairs[0], effect)


class _Saved:
    """The configuration in a checkpoint's state; options that it lacks, as an older one may, are unknown."""

    def __init__(self, state: Mapping[str, Any]):
        self.config: Mapping[str, Any] = state.get("config", {})
        self._layout: Mapping[str, int] = state.get("layout", {})

    def __getitem__(self, key: str) -> Any:
        section, _, name = key.partition(".")
        return self.config.get(section, {}).get(name)

    def differs(self, key: str, value: object) -> bool:
        section, _, name = key.partition(".")
        return name in self.config.get(section, {}) and self[key] != value

    @property
    def recipe(self) -> str | None:
        if "float8" not in (self["model.converters"] or ()):
            return None
        recipe: str = self["float8.recipe_name"] or quantization.DEFAULT_RECIPE
        return recipe

    def global_batch_size(self) -> int | None:
        """Samples of a step, also where they follow from the number of processes."""
        local, total = self["training.local_batch_size"], self["training.global_batch_size"]
        if local is None or total is None or not self._layout:
            return None
        data = self._layout.get("replicate", 1) * self._layout.get("shard", 1)
        return max(int(total), int(local) * data)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "nothing"
    return "unset" if value is None else str(value)
