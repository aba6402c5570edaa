"""Every key of a job: one dataclass per section, one field per option, which says all there is to say of it.

A field has its type, its default, its help (the string below it) and, in `Annotated`, its range, what it
needs to have an effect (`needs.py`), the package or GPU that it needs, and whether it changes the loss.
`OPTIONS` holds what the fields say; everything else about options is derived from it (see `options.py`).
Names and meanings follow torchtitan's TOML files of 2025, so that its users' files load.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any

from octavo.config import names, needs
from octavo.config.optimizers import OPTIMIZERS
from octavo.config.options import (
    OTHER_LOSS,
    SAME_LOSS,
    AlsoSpelled,
    HelpNames,
    NeedsGpu,
    NeedsPackage,
    Option,
    ValueSpelled,
    options_of,
)
from octavo.config.ranges import (
    Batches,
    Count,
    Decay,
    Decibels,
    Folder,
    FromDevices,
    HeldOut,
    Kept,
    LayerChoice,
    Norm,
    PathName,
    Percent,
    Positive,
    Range,
    Rate,
    Seed,
    Share,
    Step,
    Threads,
    WeightDecay,
    Window,
)
from octavo.config.values import shown
from octavo.core.errors import Problem
from octavo.core.secrets import redact

_STREAMED = NeedsPackage("datasets", values=names.STREAMED_DATASETS)
_FILES = " or ".join([", ".join(names.FILE_SUFFIXES[:-1]), names.FILE_SUFFIXES[-1]])
_COMPILES_SOMETHING = Range(
    lambda parts: len(parts) > 0, "must name something to compile; --compile.no-enable turns compilation off"
)


@dataclass
class Job:
    config_file: str | None = None
    """TOML file to read first, a path or a shipped name (demo.toml); flags override it."""
    dump_folder: Folder = "./outputs"
    """Folder for everything that this run writes."""
    description: str = "octavo job"
    """Free text for the log and the metrics file."""
    print_config: bool = False
    """Log the whole configuration at the start."""
    ignore_memory: bool = False
    """Start even if parameters, gradients and optimizer states exceed this machine's memory."""


@dataclass
class Profiling:
    enable_profiling: Annotated[bool, needs.REACHES_PROFILE] = False
    """Record traces with torch.profiler."""
    save_traces_folder: Annotated[Folder, needs.TRACES, needs.REACHES_PROFILE] = "profile_traces"
    """Where traces go, under job.dump_folder."""
    profile_freq: Annotated[Positive, needs.PROFILES, needs.REACHES_PROFILE] = 10
    """Steps between traces or memory snapshots."""
    enable_memory_snapshot: Annotated[bool, needs.REACHES_PROFILE, NeedsGpu()] = False
    """Record the CUDA allocator's history (needs a GPU)."""
    save_memory_snapshot_folder: Annotated[Folder, needs.SNAPSHOTS, needs.REACHES_PROFILE] = "memory_snapshot"
    """Where memory snapshots go, under job.dump_folder."""


@dataclass
class Metrics:
    log_freq: Positive = 10
    """Steps between log lines; the first and the last step are always logged."""
    enable_tensorboard: Annotated[bool, NeedsPackage("tensorboard")] = False
    """Also write TensorBoard events; the JSONL metrics file is always written."""
    enable_wandb: Annotated[bool, NeedsPackage("wandb", "wandb")] = False
    """Also log to Weights & Biases (needs the package wandb; its own variables set the destination)."""
    enable_trackio: Annotated[bool, NeedsPackage("trackio", "trackio")] = False
    """Also log to trackio (needs the package trackio; its own variables set the destination)."""
    disable_color_printing: bool = False
    """Log lines without colours."""
    save_tb_folder: Annotated[Folder, needs.TENSORBOARD] = "tb"
    """Where TensorBoard events go, under job.dump_folder."""
    save_for_all_ranks: Annotated[bool, needs.TENSORBOARD] = False
    """TensorBoard events from every rank, not from rank 0 alone."""
    log_grad_norm: bool = False
    """Add the gradient norm (before clipping) to each log line."""
    log_progress: bool = False
    """Add the step of the total, the time left, the learning rate and the epoch to each log line."""


@dataclass
class Model:
    name: Annotated[str, HelpNames(", ".join(names.MODELS))] = "llama3"
    """Model family: {names}, or your own."""
    flavor: str = "debugmodel"
    """Size of the model: debugmodel, or a published one such as 8B; the README lists them."""
    args: list[str] = field(default_factory=list)
    """Sizes in place of the flavor's, comma-separated: dim=384,n_layers=8,moe.top_k=4."""
    hf_assets_path: Annotated[Folder, AlsoSpelled("model.tokenizer_path")] = "octavo_bpe_2048"
    """Tokenizer: a shipped name, or a folder or file with tokenizer.json or tokenizer.model (also
    --model.tokenizer_path).
    """
    converters: Annotated[list[names.Converter], ValueSpelled("quantize.linear.float8", "float8")] = field(
        default_factory=list
    )
    """Comma-separated converters applied to the model: float8."""
    fuse: names.Fuse = "auto"
    """Fuse a layer's norms, gates and products of one input; auto: where float8 kernels run, on a GPU."""
    print_after_conversion: bool = False
    """Log the model's modules after the converters ran."""


@dataclass
class Optimizer:
    name: Annotated[
        names.OptimizerName,
        *(NeedsPackage(row.package, row.source, (row.name,)) for row in OPTIMIZERS.values() if row.package),
    ] = "AdamW"
    """Optimizer; AdamW8bit has one-byte moments (needs bitsandbytes)."""
    lr: Rate = 8e-4
    """Peak learning rate."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.95
    """Decay of the second moment."""
    eps: Rate = 1e-8
    """Added to the root of the second moment."""
    weight_decay: WeightDecay = 0.1
    """Weight decay: decoupled in AdamW and AdamW8bit, added to the gradient in Adam."""
    implementation: Annotated[names.OptimizerImplementation, needs.TORCHS_OPTIMIZER] = "fused"
    """How PyTorch runs the step; all three compute the same update."""
    state_dtype: Annotated[names.StateDtype, needs.STATE_DTYPE] = "float32"
    """Type of AdamW's moments; bfloat16, rounded stochastically, takes half the memory."""


@dataclass
class LRScheduler:
    warmup_steps: Count = 200
    """Steps of linear warm-up to the peak learning rate."""
    decay_ratio: Annotated[Share | None, needs.WARMUP_ENDS] = None
    """Share of the schedule spent decaying, at its end; 0 keeps the rate flat, None decays from the end of
    warm-up.
    """
    decay_type: Annotated[names.DecayType, needs.DECAYS, needs.WARMUP_ENDS] = "linear"
    """Shape of the decay; sqrt means 1 - sqrt(progress)."""
    min_lr_factor: Annotated[Share, needs.DECAYS, needs.WARMUP_ENDS] = 0.0
    """The decay ends at this multiple of the peak learning rate."""
    total_steps: Annotated[Positive | None, needs.DECAYS, needs.WARMUP_ENDS] = None
    """Steps that the schedule spans, for a run that is the beginning of a longer one; None: training.steps.
    """


@dataclass
class Training:
    dataset: Annotated[Folder, _STREAMED, HelpNames(_FILES)] = "shakespeare"
    """Corpus: shakespeare (shipped), c4 (streamed), local {names}, file or folder,
    a folder made by octavo prepare; or a mixture, books:0.7,web:0.3.
    """
    dataset_path: PathName | None = None
    """Read c4 from this local copy, not from the hub."""
    num_workers: Annotated[Threads, needs.SEVERAL_READERS] = 1
    """Threads that prepare batches ahead of time; 0 prepares them on demand. It does not change any batch."""
    max_bad_records: Annotated[Count, needs.RECORDS] = 0
    """Bad text records (not UTF-8, broken JSON, no text) to skip and count; one more is an error."""
    verify_data: Annotated[bool, needs.CHECKSUMS] = False
    """Verify the checksums of all prepared shards at the start, which reads them whole; sizes are always
    checked.
    """
    local_batch_size: Annotated[Positive, AlsoSpelled("training.batch_size")] = 8
    """Sequences per device in one forward pass (also --training.batch_size)."""
    global_batch_size: FromDevices = -1
    """Sequences per optimizer step over all devices; more than one pass each accumulates. -1:
    local_batch_size x devices.
    """
    seq_len: Positive = 2048
    """Tokens in a sequence."""
    loss_chunk_tokens: Annotated[Positive | None, needs.CHUNKS] = None
    """Compute the output projection and the loss for this many tokens at a time, so that the logits never
    exist as a whole; None: for all at once.
    """
    document_mask: bool = False
    """Attention stays within a document; without it, tokens attend across the documents of a sequence."""
    document_starts: names.DocumentStarts = "auto"
    """Whether the loss counts or ignores each label that follows a document's end, the first token of another
    document; auto: ignore with training.document_mask.
    """
    max_norm: Norm = 1.0
    """Gradients are clipped to this global norm."""
    steps: Positive = 10000
    """Optimizer steps to run."""
    enable_cpu_offload: Annotated[bool, NeedsGpu()] = False
    """Keep parameters, gradients and optimizer state in host memory (needs a GPU)."""
    dtype: names.WeightDtype = "float32"
    """Dtype of weights and their gradients; bfloat16 takes half the memory, and AdamW rounds updates
    stochastically.
    """
    mixed_precision_param: names.ParamDtype = "auto"
    """Dtype of parameters and activations in forward and backward; auto: bfloat16, or float32 on a CPU
    without bfloat16 matrix units. On a CPU the variable OCTAVO_CPU_DTYPE overrides auto.
    """
    mixed_precision_reduce: Annotated[names.ReduceDtype, needs.SEVERAL_PROCESSES] = "float32"
    """Dtype in which gradients are reduced over ranks."""
    gc_freq: Positive = 50
    """Steps between Python garbage collections; none runs in between."""
    seed: Seed = 42
    """Initial weights depend on it and the parameter's name; the order of the data on it and the sample's
    index.
    """
    data_seed: Seed | None = None
    """Seed of the data's order, so that runs with other initial weights read the same batches; None:
    training.seed.
    """
    deterministic: bool = False
    """Deterministic algorithms only; may be slower."""


@dataclass
class Parallelism:
    data_parallel_replicate_degree: Positive = 1
    """Groups of devices that each hold a whole copy of the model; groups of one are DDP."""
    data_parallel_shard_degree: FromDevices = -1
    """Devices that one copy is sharded over (FSDP2); -1: all that are left."""
    fsdp_reshard_after_forward: Annotated[
        names.ReshardAfterForward, needs.SEVERAL_PROCESSES, needs.SHARDED
    ] = "default"
    """Free gathered weights after forward and gather them again in backward. default: all but those that
    backward needs first, and none in a pipeline; always: all; never: none.
    """
    tensor_parallel_degree: Positive = 1
    """Devices that divide every matrix product, and the tokens in between (sequence parallelism)."""
    disable_loss_parallel: Annotated[bool, needs.SPLIT_LOGITS] = False
    """Gather the logits on every tensor parallel device, instead of computing the loss on their shards."""
    enable_async_tensor_parallel: Annotated[bool, needs.SPLIT_PRODUCTS, needs.COMPILED_LAYERS, NeedsGpu()] = (
        False
    )
    """Overlap tensor parallel gathers with products, in compiled layers (needs GPUs with NVLink)."""
    context_parallel_degree: Positive = 1
    """Devices that divide a sequence: each computes a part of its positions."""
    context_parallel_rotate_method: Annotated[names.RotateMethod, needs.SPLIT_SEQUENCES] = "auto"
    """How devices get the others' keys and values. allgather: each holds those of the whole sequence;
    alltoall: ring attention, at most two parts per device (no document_mask); auto: alltoall on GPUs where
    it can, else allgather.
    """
    pipeline_parallel_degree: Positive = 1
    """Groups of devices that each hold some of the layers and send activations to the next."""
    pipeline_parallel_schedule: Annotated[str, needs.PIPELINE] = "1F1B"
    """GPipe, 1F1B; with several stages per device LoopedBFS, Interleaved1F1B, InterleavedZeroBubble,
    ZBVZeroBubble; or PipelineScheduleSingle, PipelineScheduleMulti for a CSV file.
    """
    pipeline_parallel_schedule_csv: Annotated[PathName | None, needs.PIPELINE] = None
    """CSV file with a schedule: one row per device, cells such as 0F0, 1B2 (stage, F, B, I or W, microbatch).
    """
    pipeline_parallel_microbatch_size: Annotated[Positive, needs.PIPELINE] = 1
    """Sequences per microbatch; training.local_batch_size is divided into microbatches of this size."""
    pipeline_parallel_split_points: Annotated[list[str], needs.PIPELINE] = field(default_factory=list)
    """Comma-separated modules that begin each stage but the first, such as layers.2,layers.4; without them
    stages are balanced.
    """
    pipeline_parallel_layers_per_stage: Annotated[
        Positive | None, needs.PIPELINE, needs.BALANCED_STAGES, needs.COUNTED_STAGES
    ] = None
    """Layers per stage, which gives the number of stages; None: one stage per device, or two under an
    interleaved schedule.
    """
    pipeline_parallel_first_stage_less_layers: Annotated[Count, needs.PIPELINE, needs.BALANCED_STAGES] = 1
    """Layers that the embedding counts for, when stages are balanced."""
    pipeline_parallel_last_stage_less_layers: Annotated[Count, needs.PIPELINE, needs.BALANCED_STAGES] = 1
    """Layers that the norm and the output projection count for, when stages are balanced."""


@dataclass
class Checkpoint:
    enable: Annotated[bool, AlsoSpelled("checkpoint.enable_checkpoint")] = False
    """Save checkpoints, and resume from the latest one (also --checkpoint.enable_checkpoint)."""
    folder: Annotated[Folder, needs.CHECKPOINTS] = "checkpoint"
    """Where checkpoints go, under job.dump_folder."""
    interval: Annotated[Positive, needs.CHECKPOINTS, needs.SAVES] = 500
    """Steps between checkpoints; the last step is always saved."""
    load_step: Annotated[Step, needs.CHECKPOINTS] = -1
    """Resume from this step; -1: the latest that verifies."""
    load_only: Annotated[bool, needs.CHECKPOINTS] = False
    """Resume, but save nothing."""
    allow_changed: Annotated[bool, needs.CHECKPOINTS] = False
    """Resume even if the checkpoint is of another dataset, tokenizer or model, which is otherwise refused."""
    keep_latest_k: Annotated[Kept, needs.CHECKPOINTS, needs.SAVES] = 10
    """Delete all but this many that verify; 0 keeps all. At least 2, so that one complete checkpoint exists
    while another is written.
    """
    last_save_model_only: Annotated[bool, needs.CHECKPOINTS, needs.SAVES] = False
    """The last checkpoint holds the model alone; training cannot resume from it."""
    async_mode: Annotated[
        names.AsyncMode, needs.CHECKPOINTS, needs.SAVES, NeedsGpu(("async_with_pinned_mem",))
    ] = "disabled"
    """async: training continues while the checkpoint is written; async_with_pinned_mem: the same, through
    pinned memory that stays allocated (needs a GPU).
    """
    exclude_from_loading: Annotated[list[names.Excludable], needs.LOADS_BY_NAME] = field(default_factory=list)
    """Comma-separated parts not to load from checkpoint.load_step or checkpoint.initial_load_path:
    optimizer, dataloader, train_state (step and tokens seen).
    """
    create_seed_checkpoint: Annotated[bool, needs.CHECKPOINTS, needs.SAVES] = False
    """Write the initial weights as step 0 and exit; one process only."""
    hash: Annotated[names.CheckpointHash, needs.CHECKPOINTS, needs.SAVES] = "crc32"
    """How files are hashed when they are written and checked when they are loaded; none: sizes only."""
    max_failed_saves: Annotated[Positive, needs.CHECKPOINTS, needs.SAVES] = 3
    """Stop the run after this many failed saves in a row, for instance on a full disk."""
    initial_load_path: Annotated[PathName | None, OTHER_LOSS] = None
    """Start from the weights in this folder where there is no checkpoint to resume from: a checkpoint, a
    run's folder (its newest), a Hugging Face folder, or a checkpoint of torchtitan's Llama 3.
    """
    initial_load_model_only: Annotated[bool, needs.OTHER_RUN] = True
    """Load only the weights from checkpoint.initial_load_path; otherwise continue from it: optimizer, step,
    data.
    """
    initial_load_in_hf: Annotated[bool, needs.INITIAL_WEIGHTS] = False
    """checkpoint.initial_load_path is a Hugging Face folder: config.json and safetensors."""
    last_save_in_hf: Annotated[bool, needs.CHECKPOINTS] = False
    """After the last step also write the model as a Hugging Face folder, step-N-hf in checkpoint.folder."""
    export_dtype: Annotated[names.ExportDtype, needs.EXPORTS] = "float32"
    """Dtype of the weights that last_save_in_hf writes."""


@dataclass
class ActivationCheckpoint:
    mode: names.ActivationCheckpointMode = "selective"
    """What backward recomputes: nothing, a selection, or whole layers."""
    selective_ac_option: Annotated[LayerChoice, needs.SELECTIVE] = "op"
    """op: keep the outputs of expensive operations; a number n: recompute every n-th layer."""


@dataclass
class Compile:
    enable: Annotated[bool, AlsoSpelled("training.compile")] = False
    """torch.compile (also --training.compile)."""
    components: Annotated[list[names.CompileComponent], _COMPILES_SOMETHING, needs.COMPILES] = field(
        default_factory=lambda: ["model"]
    )
    """Comma-separated parts to compile: model, loss."""


@dataclass
class Float8:
    recipe_name: names.RecipeName | None = None
    """How operands are scaled and cast; None means tensorwise. unscaled_e5m2 is a negative control:
    tensorwise without scales, which loses most of a gradient.
    """
    filter_fqns: list[str] = field(default_factory=list)
    """Comma-separated parts of module names to leave in high precision, e.g. output,attention.wk."""
    emulate: bool = False
    """Compute float8 matmuls in high precision from float8-rounded operands, also where hardware exists."""
    enable_fsdp_float8_all_gather: Annotated[bool, needs.SEVERAL_PROCESSES, needs.SHARDED] = False
    """FSDP gathers weights in float8, one byte per parameter; for the recipes tensorwise,
    tensorwise_previous_step and blockwise.
    """
    precompute_float8_dynamic_scale_for_fsdp: Annotated[
        bool, needs.FLOAT8_GATHER, needs.SEVERAL_PROCESSES, needs.SHARDED
    ] = False
    """Reduce the scales of all gathered weights at once, after the optimizer's step."""
    share_scales: Annotated[bool, needs.TENSORWISE, needs.FUSION] = False
    """Fused products of several weights cast them with one scale (tensorwise only); it changes numerics."""
    recompute_gate: Annotated[bool, needs.FUSION, NeedsGpu()] = False
    """Fused layers make w2's input again in backward instead of keeping its cast: a tenth less memory for
    activations, the same numbers, a little slower.
    """
    cast_weights_once: Annotated[bool, needs.CASTS_AGAIN] = True
    """Cast weights once per optimizer step, where accumulation or activation checkpointing would repeat it;
    holds 1 to 2 bytes per parameter.
    """
    max_saturated: Annotated[Share, needs.DELAYED_SCALING] = 1e-3
    """With delayed scaling: the share (0 to 1) of any operand's elements that may saturate before the next
    step computes its own scales.
    """
    layer_recipes: list[str] = field(default_factory=list)
    """Comma-separated PATTERN=RECIPE for single layers, e.g. layers.*.attention.wk=high_precision; the last
    match counts, and filter_fqns takes precedence.
    """
    layer_recipes_file: str | None = None
    """TOML file with layer_recipes, as octavo tune writes it."""
    health_every: Annotated[Count, needs.REACHES_HEALTH, SAME_LOSS] = 0
    """Steps between measurements of the cast errors of every float8 layer (health.jsonl); 0: none.
    """
    health_tokens: Annotated[Count, needs.HEALTH, SAME_LOSS] = 32
    """Tokens per process (rows of a weight), evenly spaced, that a measurement covers; 0: all. Maxima and
    scales always cover all.
    """
    health_max_flushed: Annotated[Percent, needs.HEALTH, SAME_LOSS] = 5.0
    """Percent of an operand's values that may be flushed to zero by the cast before a warning names the
    layer.
    """
    health_max_saturated: Annotated[Percent, needs.HEALTH, SAME_LOSS] = 1.0
    """Percent of an operand's values that may exceed the format's range before a warning names the layer."""
    health_min_sqnr: Annotated[Decibels, needs.HEALTH, SAME_LOSS] = 15.0
    """Signal-to-quantization-noise ratio (SQNR) in dB below which a warning names the layer."""


@dataclass
class Comm:
    init_timeout_seconds: Annotated[Positive, needs.SEVERAL_PROCESSES] = 300
    """Timeout of collectives, and of the first step, until the first step is done."""
    train_timeout_seconds: Annotated[Positive, needs.SEVERAL_PROCESSES] = 100
    """Timeout of collectives, and of a process without progress, after the first step."""


@dataclass
class Validation:
    enable: bool = False
    """Measure the loss on held-out text during training, without changing the training in any bit."""
    dataset: Annotated[Folder | None, needs.VALIDATION, _STREAMED] = None
    """Corpus to validate on, as in training.dataset; None: the validation split of prepared folders, or what
    validation.fraction holds out.
    """
    dataset_path: Annotated[PathName | None, needs.VALIDATION] = None
    """Read a streamed validation.dataset from this local copy, not from the hub."""
    fraction: HeldOut = 0.0
    """Share of the training corpus's samples that is held out, and never trained on; also while
    validation.enable is off.
    """
    freq: Annotated[Positive, needs.VALIDATION] = 100
    """Steps between validations; the last step is always validated."""
    steps: Annotated[Batches, needs.VALIDATION] = -1
    """Batches per validation; -1: every sample once."""
    local_batch_size: Annotated[Positive | None, needs.VALIDATION] = None
    """Sequences per device in one batch; None: training.local_batch_size."""
    seq_len: Annotated[Positive | None, needs.VALIDATION] = None
    """Tokens in a sequence; None: training.seq_len."""


@dataclass
class MemoryEstimation:
    """No keys yet."""


@dataclass
class FaultTolerance:
    non_finite: names.NonFinitePolicy = "stop"
    """What to do when a loss or gradient is not finite, before any update: stop (exit code 4, naming the
    first layer), skip the update, or rewind (load the last checkpoint and continue with the data after that
    step).
    """
    spike: names.SpikePolicy = "warn"
    """What to do when a loss is far above the previous ones: off, warn, skip the update, or rewind."""
    spike_threshold: Annotated[Rate, needs.SPIKES] = 8.0
    """Deviations above the running median at which a loss counts as a spike."""
    spike_window: Annotated[Window, needs.SPIKES] = 100
    """Losses that the running median and deviation cover."""
    max_skips: Annotated[Positive, needs.SKIPS] = 10
    """Steps skipped in a row before the run stops."""
    max_rewinds: Annotated[Positive, needs.REWINDS] = 3
    """Rewinds to one checkpoint before the run stops."""


@dataclass
class Experimental:
    custom_import: str = ""
    """Dotted module to import first; it may register a model of its own."""


@dataclass
class JobConfig:
    """A whole job: one attribute per section, named as in TOML."""

    job: Annotated[Job, SAME_LOSS] = field(default_factory=Job)
    profiling: Annotated[Profiling, SAME_LOSS] = field(default_factory=Profiling)
    metrics: Annotated[Metrics, SAME_LOSS] = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Annotated[Checkpoint, SAME_LOSS] = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    float8: Annotated[Float8, needs.FLOAT8] = field(default_factory=Float8)
    comm: Annotated[Comm, SAME_LOSS] = field(default_factory=Comm)
    validation: Validation = field(default_factory=Validation)
    memory_estimation: Annotated[MemoryEstimation, SAME_LOSS] = field(default_factory=MemoryEstimation)
    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
    experimental: Experimental = field(default_factory=Experimental)

    def __post_init__(self) -> None:
        # Attributes, not fields: where the values came from is not part of the job.
        self.given: dict[str, str] = {}
        """Which keys the user set: "section.key" -> "cli" or "toml"."""
        self.where: dict[str, str] = {}
        """Where they did: "section.key" -> the flag as typed, or "file.toml:12"."""

    def get(self, name: str) -> Any:
        """The value of "section.key"."""
        section, _, key = name.partition(".")
        return getattr(getattr(self, section), key)

    def named(self, name: str) -> str:
        """An option with its value and its origin (file and line, or flag), for messages."""
        return f"{name} = {shown(self.get(name))} ({self.where.get(name, 'the default')})"

    def problem(self, name: str, what: str, remedy: str = "", *, valid: bool = False) -> Problem:
        """What is wrong with the value of an option; `what` continues its name, or begins with a colon."""
        message = f"{self.named(name)}{'' if what.startswith((':', ',')) else ' '}{what}"
        return Problem(message, remedy, name, self.where.get(name, ""), valid)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections and keys as plain values, as they would stand in TOML; without tokens that strayed in."""
        return {section: redact(dataclasses.asdict(getattr(self, section))) for section in SECTIONS}


OPTIONS: Mapping[str, Option] = MappingProxyType({option.name: option for option in options_of(JobConfig)})
"""section.key -> what its field says."""

SECTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        part.name: {option.key: option.kind for option in OPTIONS.values() if option.section == part.name}
        for part in dataclasses.fields(JobConfig)
    }
)
"""section -> key -> type."""

ALIASES: Mapping[tuple[str, str], tuple[str, str]] = MappingProxyType(
    {alias: (option.section, option.key) for option in OPTIONS.values() for alias in option.aliases}
)
"""A second spelling of a key -> the attribute that holds it."""
