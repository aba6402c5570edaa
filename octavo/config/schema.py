"""Every key of a job with its type, default and help text: one dataclass per section.

Every key has an effect. The string below a field is its help, which `octavo train --help` prints. Names and
meanings follow torchtitan's TOML files of 2025, so that its users' files load. Where one setting has two
names (`training.compile` and `compile.enable`), `ALIASES` maps them to one attribute.


"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, get_type_hints

from octavo.config import names
from octavo.core.secrets import redact


@dataclass
class Job:
    config_file: str | None = None
    """TOML file to read first, a path or a shipped name (demo.toml); flags override it."""
    dump_folder: str = "./outputs"
    """Folder for everything that this run writes."""
    description: str = "octavo job"
    """Free text for the log and the metrics file."""
    print_config: bool = False
    """Log the whole configuration at the start."""


@dataclass
class Profiling:
    enable_profiling: bool = False
    """Record traces with torch.profiler."""
    save_traces_folder: str = "profile_traces"
    """Where traces go, under job.dump_folder."""
    profile_freq: int = 10
    """Steps between traces or memory snapshots."""
    enable_memory_snapshot: bool = False
    """Record the CUDA allocator's history (needs a GPU)."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Where memory snapshots go, under job.dump_folder."""


@dataclass
class Metrics:
    log_freq: int = 10
    """Steps between log lines; step 1 is always logged."""
    enable_tensorboard: bool = False
    """Also write TensorBoard events; the JSONL metrics file is always written."""
    enable_wandb: bool = False
    """Also log to Weights & Biases (needs the package wandb; its own variables set the destination)."""
    enable_trackio: bool = False
    """Also log to trackio (needs the package trackio; its own variables set the destination)."""
    disable_color_printing: bool = False
    """Log lines without colours."""
    save_tb_folder: str = "tb"
    """Where TensorBoard events go, under job.dump_folder."""
    save_for_all_ranks: bool = False
    """TensorBoard events from every rank, not from rank 0 alone."""
    log_grad_norm: bool = False
    """Add the gradient norm (before clipping) to each log line."""


@dataclass
class Model:
    name: str = "llama3"
    """Model family: llama3, qwen3, or your own."""
    flavor: str = "debugmodel"
    """Size of the model: debugmodel, or a published one such as 8B; the README lists them."""
    hf_assets_path: str = "octavo_bpe_2048"
    """Tokenizer: a shipped name, or a folder or file with tokenizer.json or tokenizer.model (also
    --model.tokenizer_path).
    """
    converters: list[names.Converter] = field(default_factory=list)
    """Comma-separated converters applied to the model: float8."""
    fuse: names.Fuse = "auto"
    """Fuse a layer's norms, gates and products of one input; auto: where float8 kernels run, on a GPU."""
    print_after_conversion: bool = False
    """Log the model's modules after the converters ran."""


@dataclass
class Optimizer:
    name: names.OptimizerName = "AdamW"
    """Optimizer; AdamW8bit has one-byte moments (needs bitsandbytes)."""
    lr: float = 8e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Weight decay: decoupled in AdamW and AdamW8bit, added to the gradient in Adam."""
    implementation: names.OptimizerImplementation = "fused"
    """How PyTorch runs the step; all three compute the same update."""
    state_dtype: names.StateDtype = "float32"
    """Type of AdamW's moments; bfloat16, rounded stochastically, takes half the memory."""


@dataclass
class LRScheduler:
    warmup_steps: int = 200
    """Steps of linear warm-up to the peak learning rate."""
    decay_ratio: float | None = None
    """Share of training.steps spent decaying, at the end; 0 keeps the rate flat, None decays from the end
    of warm-up.
    """
    decay_type: names.DecayType = "linear"
    """Shape of the decay; sqrt means 1 - sqrt(progress)."""
    min_lr_factor: float = 0.0
    """The decay ends at this multiple of the peak learning rate."""


@dataclass
class Training:
    dataset: str = "shakespeare"
    """Corpus: shakespeare (shipped), c4 (streamed), local .txt, .jsonl, .json or .parquet, file or folder,
    a folder made by octavo prepare; or a mixture, books:0.7,web:0.3.
    """
    dataset_path: str | None = None
    """Read c4 from this local copy, not from the hub."""
    num_workers: int = 1
    """Threads that prepare batches ahead of time; 0 prepares them on demand. It does not change any batch."""
    max_bad_records: int = 0
    """Bad text records (not UTF-8, broken JSON, no text) to skip and count; one more is an error."""
    verify_data: bool = False
    """Verify the checksums of all prepared shards at the start, which reads them whole; sizes are always
    checked.
    """
    local_batch_size: int = 8
    """Sequences per device in one forward pass (also --training.batch_size)."""
    global_batch_size: int = -1
    """Sequences per optimizer step over all devices; more than one pass each accumulates. -1:
    local_batch_size x devices.
    """
    seq_len: int = 2048
    """Tokens in a sequence."""
    loss_chunk_tokens: int | None = None
    """Compute the output projection and the loss for this many tokens at a time, so that the logits never
    exist as a whole; None: for all at once.
    """
    document_mask: bool = False
    """Attention stays within a document; without it, tokens attend across the documents of a sequence."""
    max_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    steps: int = 10000
    """Optimizer steps to run."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory (needs a GPU)."""
    dtype: names.WeightDtype = "float32"
    """Dtype of weights and their gradients; bfloat16 takes half the memory, and AdamW rounds updates
    stochastically.
    """
    mixed_precision_param: names.ParamDtype = "auto"
    """Dtype of parameters and activations in forward and backward; auto: bfloat16, or float32 on a CPU
    without bfloat16 matrix units. On a CPU the variable OCTAVO_CPU_DTYPE overrides auto.
    """
    mixed_precision_reduce: names.ReduceDtype = "float32"
    """Dtype in which gradients are reduced over ranks."""
    gc_freq: int = 50
    """Steps between Python garbage collections; none runs in between."""
    seed: int = 42
    """Initial weights depend on it and the parameter's name; the order of the data on it and the sample's
    index.
    """
    data_seed: int | None = None
    """Seed of the data's order, so that runs with other initial weights read the same batches; None:
    training.seed.
    """
    deterministic: bool = False
    """Deterministic algorithms only; may be slower."""


@dataclass
class Parallelism:
    data_parallel_replicate_degree: int = 1
    """Groups of devices that each hold a whole copy of the model; groups of one are DDP."""
    data_parallel_shard_degree: int = -1
    """Devices that one copy is sharded over (FSDP2); -1: all that are left."""
    fsdp_reshard_after_forward: names.ReshardAfterForward = "default"
    """Free gathered weights after forward and gather them again in backward. default: all but those that
    backward needs first, and none in a pipeline; always: all; never: none.
    """
    tensor_parallel_degree: int = 1
    """Devices that divide every matrix product, and the tokens in between (sequence parallelism)."""
    disable_loss_parallel: bool = False
    """Gather the logits on every tensor parallel device, instead of computing the loss on their shards."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor parallel gathers with products, in compiled layers (needs GPUs with NVLink)."""
    context_parallel_degree: int = 1
    """Devices that divide a sequence: each computes a part of its positions."""
    context_parallel_rotate_method: names.RotateMethod = "allgather"
    """How devices get the others' keys and values. allgather: each holds those of the whole sequence;
    alltoall: ring attention, at most two parts per device (no document_mask).
    """
    pipeline_parallel_degree: int = 1
    """Groups of devices that each hold some of the layers and send activations to the next."""
    pipeline_parallel_schedule: str = "1F1B"
    """GPipe, 1F1B; with several stages per device LoopedBFS, Interleaved1F1B, InterleavedZeroBubble,
    ZBVZeroBubble; or PipelineScheduleSingle, PipelineScheduleMulti for a CSV file.
    """
    pipeline_parallel_schedule_csv: str | None = None
    """CSV file with a schedule: one row per device, cells such as 0F0, 1B2 (stage, F, B, I or W, microbatch).
    """
    pipeline_parallel_microbatch_size: int = 1
    """Sequences per microbatch; training.local_batch_size is divided into microbatches of this size."""
    pipeline_parallel_split_points: list[str] = field(default_factory=list)
    """Comma-separated modules that begin each stage but the first, such as layers.2,layers.4; without them
    stages are balanced.
    """
    pipeline_parallel_layers_per_stage: int | None = None
    """Layers per stage, which gives the number of stages; None: one stage per device, or two under an
    interleaved schedule.
    """
    pipeline_parallel_first_stage_less_layers: int = 1
    """Layers that the embedding counts for, when stages are balanced."""
    pipeline_parallel_last_stage_less_layers: int = 1
    """Layers that the norm and the output projection count for, when stages are balanced."""


@dataclass
class Checkpoint:
    enable: bool = False
    """Save checkpoints, and resume from the latest one (also --checkpoint.enable_checkpoint)."""
    folder: str = "checkpoint"
    """Where checkpoints go, under job.dump_folder."""
    interval: int = 500
    """Steps between checkpoints; the last step is always saved."""
    load_step: int = -1
    """Resume from this step; -1: the latest that verifies."""
    load_only: bool = False
    """Resume, but save nothing."""
    keep_latest_k: int = 10
    """Delete all but this many that verify; 0 keeps all. At least 2, so that one complete checkpoint exists
    while another is written.
    """
    last_save_model_only: bool = False
    """The last checkpoint holds the model alone; training cannot resume from it."""
    async_mode: names.AsyncMode = "disabled"
    """async: training continues while the checkpoint is written; async_with_pinned_mem: the same, through
    pinned memory that stays allocated (needs a GPU).
    """
    exclude_from_loading: list[names.Excludable] = field(default_factory=list)
    """Comma-separated parts not to load from checkpoint.load_step or checkpoint.initial_load_path:
    optimizer, dataloader, train_state (step and tokens seen).
    """
    create_seed_checkpoint: bool = False
    """Write the initial weights as step 0 and exit; one process only."""
    hash: names.CheckpointHash = "crc32"
    """How files are hashed when they are written and checked when they are loaded; none: sizes only."""
    max_failed_saves: int = 3
    """Stop the run after this many failed saves in a row, for instance on a full disk."""
    initial_load_path: str | None = None
    """Start from the weights in this folder where there is no checkpoint to resume from: a checkpoint, a
    run's folder (its newest), or a Hugging Face folder.
    """
    initial_load_model_only: bool = True
    """Load only the weights from checkpoint.initial_load_path; otherwise continue from it: optimizer, step,
    data.
    """
    initial_load_in_hf: bool = False
    """checkpoint.initial_load_path is a Hugging Face folder: config.json and safetensors."""
    last_save_in_hf: bool = False
    """After the last step also write the model as a Hugging Face folder, step-N-hf in checkpoint.folder."""
    export_dtype: names.ExportDtype = "float32"
    """Dtype of the weights that last_save_in_hf writes."""


@dataclass
class ActivationCheckpoint:
    mode: names.ActivationCheckpointMode = "selective"
    """What backward recomputes: nothing, a selection, or whole layers."""
    selective_ac_option: str = "op"
    """op: keep the outputs of expensive operations; a number n: recompute every n-th layer."""


@dataclass
class Compile:
    enable: bool = False
    """torch.compile (also --training.compile)."""
    components: list[names.CompileComponent] = field(default_factory=lambda: ["model"])
    """Comma-separated parts to compile: model, loss."""


@dataclass
class Float8:
    recipe_name: names.AnyRecipeName | None = None
    """How operands are scaled and cast; None means tensorwise. unscaled_e5m2 is a negative control:
    tensorwise without scales, which loses most of a gradient.
    """
    filter_fqns: list[str] = field(default_factory=list)
    """Comma-separated parts of module names to leave in high precision, e.g. output,attention.wk."""
    emulate: bool = False
    """Compute float8 matmuls in high precision from float8-rounded operands, also where hardware exists."""
    enable_fsdp_float8_all_gather: bool = False
    """FSDP gathers weights in float8, one byte per parameter; for the recipes tensorwise,
    tensorwise_previous_step and blockwise.
    """
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Reduce the scales of all gathered weights at once, after the optimizer's step."""
    share_scales: bool = False
    """Fused products of several weights cast them with one scale (tensorwise only); it changes numerics."""
    cast_weights_once: bool = True
    """Cast weights once per optimizer step, where accumulation or activation checkpointing would repeat it;
    holds 1 to 2 bytes per parameter.
    """
    max_saturated: float = 1e-3
    """With delayed scaling: the share (0 to 1) of any operand's elements that may saturate before the next
    step computes its own scales.
    """
    layer_recipes: list[str] = field(default_factory=list)
    """Comma-separated PATTERN=RECIPE for single layers, e.g. layers.*.attention.wk=high_precision; the last
    match counts, and filter_fqns takes precedence.
    """
    layer_recipes_file: str | None = None
    """TOML file with layer_recipes, as octavo tune writes it."""
    health_every: int = 0
    """Steps between measurements of the cast errors of every float8 layer (health.jsonl); 0: none.
    """
    health_tokens: int = 32
    """Tokens per process (rows of a weight), evenly spaced, that a measurement covers; 0: all. Maxima and
    scales always cover all.
    """
    health_max_flushed: float = 5.0
    """Percent of an operand's values that may be flushed to zero by the cast before a warning names the
    layer.
    """
    health_max_saturated: float = 1.0
    """Percent of an operand's values that may exceed the format's range before a warning names the layer."""
    health_min_sqnr: float = 15.0
    """Signal-to-quantization-noise ratio (SQNR) in dB below which a warning names the layer."""


@dataclass
class Comm:
    init_timeout_seconds: int = 300
    """Timeout of collectives, and of the first step, until the first step is done."""
    train_timeout_seconds: int = 100
    """Timeout of collectives, and of a process without progress, after the first step."""


@dataclass
class Validation:
    enable: bool = False
    """Measure the loss on held-out text during training, without changing the training in any bit."""
    dataset: str | None = None
    """Corpus to validate on, as in training.dataset; None: the validation split of prepared folders, or what
    validation.fraction holds out.
    """
    dataset_path: str | None = None
    """Read a streamed validation.dataset from this local copy, not from the hub."""
    fraction: float = 0.0
    """Share of the training corpus's samples that is held out, and never trained on; also while
    validation.enable is off.
    """
    freq: int = 100
    """Steps between validations; the last step is always validated."""
    steps: int = -1
    """Batches per validation; -1: every sample once."""
    local_batch_size: int | None = None
    """Sequences per device in one batch; None: training.local_batch_size."""
    seq_len: int | None = None
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
    spike_threshold: float = 8.0
    """Deviations above the running median at which a loss counts as a spike."""
    spike_window: int = 100
    """Losses that the running median and deviation cover."""
    max_skips: int = 10
    """Steps skipped in a row before the run stops."""
    max_rewinds: int = 3
    """Rewinds to one checkpoint before the run stops."""


@dataclass
class Experimental:
    custom_import: str = ""
    """Dotted module to import first; it may register a model of its own."""


@dataclass
class JobConfig:
    """A whole job: one attribute per section, named as in TOML."""

    job: Job = field(default_factory=Job)
    profiling: Profiling = field(default_factory=Profiling)
    metrics: Metrics = field(default_factory=Metrics)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    float8: Float8 = field(default_factory=Float8)
    comm: Comm = field(default_factory=Comm)
    validation: Validation = field(default_factory=Validation)
    memory_estimation: MemoryEstimation = field(default_factory=MemoryEstimation)
    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
    experimental: Experimental = field(default_factory=Experimental)

    def __post_init__(self) -> None:
        # Attributes, not fields: where the values came from is not part of the job.
        self.given: dict[str, str] = {}
        """Which keys the user set: "section.key" -> "cli" or "toml"."""
        self.where: dict[str, str] = {}
        """Where they did: "section.key" -> the flag as typed, or "file.toml:12"."""

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections and keys as plain values, as they would stand in TOML; without tokens that strayed in."""
        return {section: redact(dataclasses.asdict(getattr(self, section))) for section in SECTIONS}


def _keys(section_type: type) -> Mapping[str, Any]:
    return MappingProxyType(
        {f.name: get_type_hints(section_type)[f.name] for f in dataclasses.fields(section_type)}
    )


SECTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {f.name: _keys(get_type_hints(JobConfig)[f.name]) for f in dataclasses.fields(JobConfig)}
)
"""section -> key -> type, read from the dataclasses above."""

ALIASES: Mapping[tuple[str, str], tuple[str, str]] = MappingProxyType(
    {
        ("training", "compile"): ("compile", "enable"),
        ("training", "batch_size"): ("training", "local_batch_size"),
        ("checkpoint", "enable_checkpoint"): ("checkpoint", "enable"),
        ("model", "tokenizer_path"): ("model", "hf_assets_path"),
    }
)
"""A second spelling of a key -> the attribute that holds it."""
