"""What octavo computes on processors other than this one.

PyTorch and oneDNN choose their code by what the processor has, and each reads a variable that makes it choose
as on an older one; and OCTAVO_CPU_DTYPE makes the trainer choose as on one with matrix units. Any test can be
run so, for instance the whole suite:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ./run_tests.sh
    OCTAVO_CPU_DTYPE=bfloat16 ./run_tests.sh

Here a few tests are, each time in a process of its own: parity with torchao, golden losses, compiled
code, and training that once depended on the processor.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from tests.conftest import ROOT
from tests.helpers.waiting import LIMIT

# What the libraries say of their choice, and then pytest.
PROGRAM = """
import sys
import pytest, torch
from octavo.metrics.device import auto_param_dtype
with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
    torch.relu(torch.ones(64).to_mkldnn())
print("PyTorch:", torch.backends.cpu.get_cpu_capability())
print("auto:", auto_param_dtype(torch.device("cpu"))[0], flush=True)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@dataclass(frozen=True)
class Processor:
    """variables: what makes the libraries choose as on it. message: what they then say, a regular expression.
    tests: what is run.
    """

    variables: dict[str, str]
    message: str
    tests: tuple[str, ...]


PARITY = ("tests/float8/test_parity.py::test_small_layers_equal_torchao[tensorwise]",)
COMPILED = ("tests/train/test_processors.py::test_compiled_code_is_for_this_processor",)
GOLDEN = ("tests/train/test_trainer.py::test_golden_losses[tensorwise]",)
TRAINING = ("tests/train/test_small_training.py::test_a_chunked_loss_trains_alike[1]",)
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
PROCESSORS = {
    "AVX2": Processor(AVX2, r"isa:Intel AVX2\n(.*\n)*PyTorch: AVX2\n", (*PARITY, *GOLDEN)),
    "AVX2, compiled": Processor(AVX2, "PyTorch: AVX2\n", COMPILED),
    # Each of another library, so that one process shows both.
    "AVX-512 without bfloat16 in oneDNN, bfloat16 chosen by the trainer": Processor(
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OCTAVO_CPU_DTYPE": "bfloat16"},
        r"isa:Intel AVX(2|-512 with AVX512BW, AVX512VL, and AVX512DQ extensions)\n"
        r"(.*\n)*auto: torch.bfloat16\n",
        (*PARITY, *TRAINING),
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_is_for_this_processor():
    """And not what the same test, as on another one, has left in a cache: tests/conftest.py sees to that."""

    def sums(x):
        return (x.t().contiguous() * 2 + x.amax(1)).sum(0)

    x = torch.arange(96.0 * 96).reshape(96, 96)
    torch.testing.assert_close(torch.compile(sums)(x), sums(x))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if p.tests is COMPILED else n for n, p in PROCESSORS.items()],
)
def test_a_few_tests_pass_as_on(name):
    processor = PROCESSORS[name]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *processor.tests],
        cwd=ROOT,
        env={**os.environ, **processor.variables},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(processor.message, ended.stdout), ended.stdout
    assert f"\n{len(processor.tests)} passed" in ended.stdout
