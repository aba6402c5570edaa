"""The trainer, from a config to a trained model. Read from the top: `main`, then `Trainer.__init__`, then
`Trainer.train`.

Run it by `./run_train.sh`, by `octavo train`, or by `torchrun … -m octavo.train --job.config_file …`.

Two laws hold for any number of processes. The model starts from weights that depend on the seed and the
parameters' names alone (`components/init.py`), and step s consumes the global samples [s G, (s+1) G) of the
data, G the global batch (`data/loader.py`). The loss of a microbatch is its sum over tokens divided by
the number of tokens in the global batch, so the gradients of all microbatches of all processes simply add
up.
"""

import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import octavo
from octavo import config, models, quantization
from octavo.components.checkpoint import Checkpointer
from octavo.components.device import auto_param_dtype, peak_flops, pick_device
from octavo.components.garbage import GarbageCollector
from octavo.components.init import init_weights
from octavo.components.logging import init_logger, logger
from octavo.components.lr_scheduler import lr_factor, set_lr
from octavo.components.metrics import MetricsLogger, StepReport, write_run_record
from octavo.components.optimizer import build_optimizer
from octavo.components.profiling import profiling
from octavo.components.run_folder import RunFolder
from octavo.components.tokenizer import Tokenizer, build_tokenizer
from octavo.config import ConfigError, JobConfig
from octavo.config.schema import Training
from octavo.data.loader import build_dataloader, merge_state_dicts
from octavo.distributed import mesh
from octavo.distributed.plan import Parallelize, Sharding
from octavo.hf.training import check_exportable, export_folder, load_initial, save_final

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def loss_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross entropy in float32, summed over the tokens; a scalar."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten(), reduction="sum")


def fastest_attention() -> AbstractContextManager[None]:
    """Let scaled_dot_product_attention choose in this order whatever the device and shapes allow."""
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def wants_color() -> bool:
    """Colours on a terminal; torchrun's workers have none, so the launcher sets FORCE_COLOR for them."""
    wanted = sys.stderr.isatty() or bool(os.environ.get("FORCE_COLOR"))
    return wanted and not os.environ.get("NO_COLOR")


def set_determinism(training: Training) -> None:
    """Seed torch's own generators, and allow deterministic algorithms only if asked to."""
    torch.manual_seed(training.seed)
    if training.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def choose_param_dtype(training: Training, device: torch.device) -> torch.dtype:
    """The dtype that layers compute in, logged with its reason."""
    if training.mixed_precision_param == "auto":
        dtype, reason = auto_param_dtype(device)
    else:
        dtype = _DTYPES[training.mixed_precision_param]
        reason = "training.mixed_precision_param asks for it"
    logger.info("High precision is %s here: %s", str(dtype).removeprefix("torch."), reason)
    return dtype


class Trainer:
    """One process's part of a job: everything is built here, in the order in which it depends on each
    other.
    """

    def __init__(self, job: JobConfig):
        self.job = job
        logger.info("Starting job: %s", job.job.description)
        if job.job.print_config:
            logger.info("Running with config: %s", job.to_dict())
        for note in config.notes(job):
            logger.info(note)
        self.folder = RunFolder(job.job.dump_folder, lock=os.environ.get("RANK", "0") == "0")
        if job.experimental.custom_import:
            importlib.import_module(job.experimental.custom_import)

        self.device = pick_device()
        set_determinism(job.training)
        self.param_dtype = choose_param_dtype(job.training, self.device)
        self.world = mesh.init_world(self.device, job.parallelism, job.comm)

        tokenizer = self.tokenizer = build_tokenizer(job.model.hf_assets_path)
        self.model_args = self._model_args(tokenizer)  # before the data: a misfit needn't wait for it
        self.data = build_dataloader(
            dataset=job.training.dataset,
            dataset_path=job.training.dataset_path,
            tokenizer=tokenizer,
            seq_len=job.training.seq_len,
            local_batch_size=job.training.local_batch_size,
            dp_rank=self.world.data_rank,
            dp_degree=self.world.data_size,
            seed=job.training.seed,
        )
        one_pass = job.training.local_batch_size * self.world.data_size
        logger.info("Data: %s", self.data.description)
        self.global_batch_size = max(job.training.global_batch_size, one_pass)
        self.accumulation = self.global_batch_size // one_pass
        self.global_tokens = self.global_batch_size * job.training.seq_len

        self.recipe = quantization.recipe_name(job.model.converters, job.float8)
        self.model, flops_per_token = self._build_model()
        compile_loss = job.compile.enable and "loss" in job.compile.components
        self.loss_sum = torch.compile(loss_sum) if compile_loss else loss_sum
        self.optimizer = build_optimizer(self.model, job.optimizer)

        self.checkpointer = Checkpointer(
            job.checkpoint, self.folder.path / job.checkpoint.folder, self.model, self.optimizer
        )
        peak = peak_flops(self.device)
        logger.info(
            "Peak FLOPS used for computing MFU: %s (%s)",
            "none" if peak.flops is None else f"{peak.flops:.3e}",
            peak.source,
        )
        self.metrics = MetricsLogger(
            job.metrics,
            self.folder.path,
            rank=self.world.rank,
            device=self.device,
            flops_per_token=flops_per_token,
            peak=peak,
            color=wants_color(),
        )
        self.tokens_seen = 0
        logger.info(
            "Trainer is initialized with local batch size %d, global batch size %d, "
            "gradient accumulation steps %d, sequence length %d, total steps %d (warmup %d)",
            job.training.local_batch_size,
            self.global_batch_size,
            self.accumulation,
            job.training.seq_len,
            job.training.steps,
            job.lr_scheduler.warmup_steps,
        )

    def _model_args(self, tokenizer: Tokenizer) -> Any:
        """The model's own arguments, fitted to the job; `ConfigError` where they can't be."""
        job = self.job
        spec = models.get(job.model.name)
        args = spec.configure(spec.args(job.model.flavor), tokenizer.vocab_size, job.training.seq_len)
        if job.checkpoint.last_save_in_hf:
            check_exportable(spec)
        if not job.training.document_mask:
            return args
        if spec.mask_documents is None:
            raise ConfigError(
                f"training.document_mask = true: the model {spec.name} has no such mask; leave it out"
            )
        return spec.mask_documents(args, tokenizer.eos_id)

    def _build_model(self) -> tuple[nn.Module, float]:
        """The model on its device, converted, parallelised and initialised; and its FLOPs per token."""
        job, args = self.job, self.model_args
        spec = models.get(job.model.name)
        logger.info("Building %s %s with %s", spec.name, job.model.flavor, args)
        with torch.device("meta"):
            model = spec.build(args)
        if self.recipe is not None:
            if job.compile.enable:
                quantization.keep_casts_under_compile()
            quantization.convert(
                model,
                self.recipe,
                job.float8,
                self.device,
                filters_given_on_cli=job.given.get("float8.filter_fqns") == "cli",
            )
        if job.model.print_after_conversion:
            logger.info("Model after conversion: %s", model)
        size = sum(p.numel() for p in model.parameters())
        logger.info("Model %s %s size: %s total parameters", spec.name, job.model.flavor, f"{size:,}")
        flops_per_token = spec.flops_per_token(args, model, job.training.seq_len)

        spec.parallelize(model, self._plan())
        model.to_empty(device="cpu" if job.training.enable_cpu_offload else self.device)
        init_weights(model, job.training.seed)
        return model.train(), flops_per_token

    def _plan(self) -> Parallelize:
        job = self.job
        sharding = None
        # One process in float32 needs no wrapper; FSDP2 also casts to param_dtype, and offloads.
        alone = self.world.size == 1 and self.param_dtype is torch.float32
        if not alone or job.training.enable_cpu_offload:
            sharding = Sharding(
                mesh=self.world.mesh,
                param_dtype=self.param_dtype,
                reduce_dtype=_DTYPES[job.training.mixed_precision_reduce],
                reshard=job.parallelism.fsdp_reshard_after_forward != "never",
                cpu_offload=job.training.enable_cpu_offload,
            )
        return Parallelize(
            activation_checkpoint=job.activation_checkpoint,
            compile_model=job.compile.enable and "model" in job.compile.components,
            sharding=sharding,
        )

    def train(self) -> None:
        """Run the steps that are left, and say where everything is."""
        for _ in self.steps():
            pass
        self._farewell()

    def steps(self) -> Iterator[int]:
        """Run the steps that are left, yielding the number of each one when it is done."""
        last = self.job.training.steps
        done = self._resume()
        if self.world.rank == 0:
            write_run_record(self.folder.path, self._record())
        collector = GarbageCollector(self.job.training.gc_freq)
        if done < last:
            logger.info("Training starts at step %d.", done + 1)
        else:
            logger.info("All %d steps of this run are done; a larger training.steps goes on from here", done)
        self.metrics.start(done)
        with (
            fastest_attention(),
            profiling(self.job.profiling, self.folder.path, self.world.rank) as end_of_step,
        ):
            for step in range(done + 1, last + 1):
                collector.run(step)
                self._step(step)
                if self.checkpointer.due(step, last):
                    self.checkpointer.save(step, last, self._state())
                self.checkpointer.poll()
                if step == done + 1:
                    mesh.set_timeout(self.job.comm.train_timeout_seconds)
                end_of_step()
                yield step
        self.checkpointer.wait()
        if self.job.checkpoint.last_save_in_hf:
            self._export(last)
        self.metrics.close()
        self.data.close()

    def _step(self, step: int) -> StepReport | None:
        """One optimizer step; its report if it is one that is reported."""
        settings = self.job
        lr = settings.optimizer.lr * lr_factor(step, settings.training.steps, settings.lr_scheduler)
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad()

        loss = torch.zeros((), device=self.device)
        with quantization.weights_cast_once(self.model, settings, self.world.size):
            for _ in range(self.accumulation):
                tokens_BS, labels_BS = self._next_batch()
                microbatch_loss = self.loss_sum(self.model(tokens_BS), labels_BS) / self.global_tokens
                microbatch_loss.backward()
                loss += microbatch_loss.detach()

        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.training.max_norm)
        self.optimizer.step()
        quantization.after_optimizer_step(self.model, settings.float8)
        self.tokens_seen += self.global_tokens
        self.metrics.end_step()
        if not self.metrics.due(step):
            return None
        if self.world.size > 1:
            dist.all_reduce(loss)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        return self.metrics.report(
            step=step, loss=loss.item(), grad_norm=grad_norm.item(), lr=lr, tokens=self.tokens_seen
        )

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """The next microbatch on the device: tokens and labels, int64 [B, S]."""
        start = time.perf_counter()
        tokens_BS, labels_BS = self.data.next_batch()
        self.metrics.add_batch(tokens_BS.numel(), time.perf_counter() - start)
        return tokens_BS.to(self.device, non_blocking=True), labels_BS.to(self.device, non_blocking=True)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors; the same on every process."""
        data_states: list[Any] = [None] * self.world.size
        dist.all_gather_object(data_states, self.data.state_dict())
        return {
            "octavo": octavo.__version__,
            "torch": torch.__version__,
            "config": self.job.to_dict(),
            "tokens_seen": self.tokens_seen,
            "data": merge_state_dicts(data_states),
            "schedule": self._schedule(),
        }

    def _schedule(self) -> dict[str, Any]:
        """What an update depends on beside the step and the gradients."""
        decays = self.job.lr_scheduler.decay_ratio != 0
        return {
            "optimizer": asdict(self.job.optimizer),
            "lr_scheduler": asdict(self.job.lr_scheduler),
            "steps": self.job.training.steps if decays else None,
        }

    def _resume(self) -> int:
        """Go on from a checkpoint if there is one; returns the steps already done."""
        state = self.checkpointer.load()
        if state is None:
            self._load_initial()
            return 0
        inexact = self.data.load_state_dict(state["data"])
        if inexact:
            logger.warning("The data does not go on where the checkpoint's run stood: %s", inexact)
        self.tokens_seen = state["tokens_seen"]
        logger.info(
            "Resumed from the checkpoint of step %d (%s tokens)", state["step"], f"{self.tokens_seen:,}"
        )
        if state["schedule"] != self._schedule():
            logger.warning(
                "The optimizer goes on otherwise than the checkpoint's run would have: %s then, %s now",
                state["schedule"],
                self._schedule(),
            )
        return int(state["step"])

    def _load_initial(self) -> None:
        """Start from weights of another run or model, if the job names some."""
        settings, model = self.job.checkpoint, self.job.model
        if settings.initial_load_path is not None:
            path, in_hf = Path(settings.initial_load_path), settings.initial_load_in_hf
            load_initial(self.model, path, in_hf, models.get(model.name), self.model_args, model.flavor)

    def _export(self, step: int) -> None:
        """Write the trained model in Hugging Face's format, unless an earlier run of this job did."""
        settings, spec = self.job.checkpoint, models.get(self.job.model.name)
        out = export_folder(self.folder.path / settings.folder, step)
        there = torch.tensor(int(out.exists()), device=self.device)
        dist.broadcast(there, 0)  # the first process writes it, and need not share its disk with the others
        if not there.item():
            save_final(self.model, out, settings.export_dtype, spec, self.model_args, self.tokenizer)

    def _record(self) -> dict[str, Any]:
        return {
            "octavo": octavo.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "processes": self.world.size,
            "precision": self.recipe or str(self.param_dtype).removeprefix("torch."),
            "high_precision_dtype": str(self.param_dtype).removeprefix("torch."),
            "config": self.job.to_dict(),
        }

    def _farewell(self) -> None:
        logger.info("Training completed")
        if self.world.rank == 0:
            metrics = self.folder.path / "metrics.jsonl"
            logger.info(
                "Everything was written to %s. To look at the losses: tail %s", self.folder.path, metrics
            )
            if self.job.metrics.enable_tensorboard:
                logger.info(
                    "To see the curves: tensorboard --logdir %s",
                    self.folder.path / self.job.metrics.save_tb_folder,
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Train as `argv` (default: the command line) says; returns the exit code, 2 for an error of the
    user's.
    """
    init_logger()
    try:
        job = config.load(sys.argv[1:] if argv is None else argv)
        config.check(job, world_size=int(os.environ.get("WORLD_SIZE", "1")), gpus=torch.cuda.device_count())
        Trainer(job).train()
    except ConfigError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        logger.info("Interrupted")
        return 130
    mesh.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
