"""The estimate of a process's peak against real training runs.

Real runs are counted by the same tracker, on real tensors (what an operation allocates for itself and frees
again it does not see), and, in one case, by PyTorch's CPU allocator.
"""

import pytest

from octavo import config
from octavo.commands.estimate.peak_memory import peak_memory
from octavo.commands.estimate.rank_trace import trace_rank
from tests.commands.estimate.measured import flags, measure
from tests.helpers import ranks
from tests.helpers.launching import recipe, shallow

SMALL = {**shallow(2), "training.seq_len": 48, "training.local_batch_size": 2}
WHOLE = {"experimental.custom_import": "", "model.name": "llama3", "model.flavor": "debugmodel"}
GATHER = {"float8.enable_fsdp_float8_all_gather": True, **WHOLE}  # where buffers are not all there is

# name -> (processes, flags)
CASES = {
    "one process": (1, {}),
    "full checkpointing": (1, {"activation_checkpoint.mode": "full"}),
    "selective checkpointing": (1, {"activation_checkpoint.mode": "selective"}),
    "accumulation": (1, {"training.global_batch_size": 6}),
    "FSDP": (2, {}),
    "FSDP, tensorwise": (2, recipe("tensorwise")),
    "FSDP, rowwise": (2, recipe("rowwise")),
    "FSDP, float8 gathers": (2, recipe("tensorwise") | GATHER),
    "FSDP, blockwise, float8 gathers": (2, recipe("blockwise") | GATHER),
    "tensor parallel": (2, {"parallelism.tensor_parallel_degree": 2}),
    "pipeline": (2, {"parallelism.pipeline_parallel_degree": 2}),
}


def peak(argv, processes):
    return peak_memory(trace_rank(config.load(argv), processes).log).peak


def estimated(folder, changes, processes):
    """In a process of its own, since a process has one process group."""
    return ranks.fork([(peak, (flags(folder, changes), processes))])[0]


OFTEN = ("one process", "full checkpointing", "accumulation", "FSDP, float8 gathers", "tensor parallel")
"""The others take more than a minute of CPU together: marked slow."""


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_within_a_tenth_of_a_real_run(tmp_path, name):
    processes, changes = CASES[name]
    changes = SMALL | changes
    allocator = name == "one process"
    measured = measure(tmp_path / "run", changes, processes, allocator=allocator)
    expected = estimated(tmp_path, changes, processes)

    # When gloo lets go of a buffer differs from run to run: 2.6% of the peak were seen, once in many.
    assert expected == pytest.approx(measured.tracker, rel=0.03)
    assert expected == pytest.approx(measured.allocator, rel=0.1)
