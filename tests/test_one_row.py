"""A recipe, an optimizer and a file format are one row each: what follows from one more in a copy."""

from typing import Any

import pytest

from tests.helpers.edited_copy import ask_edited_copy

RECIPE = """
            Recipe(
                "rows_of_64",
                output=Gemm(Cast(_E4M3, (1, 64)), Cast(_E4M3, (1, 64))),
                grad_input=_HIGH_PRECISION,
                grad_weight=_HIGH_PRECISION,
            ),"""
OPTIMIZER = """
            OptimizerKind(
                "NAdam",
                "torch.optim:NAdam",
                ("for-loop", "foreach"),
                why_whole="it is new",
                package="lacking",
                source="it",
            ),"""
FORMAT = """
            FileFormat("poem", (".poem",), "one per verse", _read_lines, place=", verse {record.number}"),"""
EDITS = {
    "octavo/float8/recipe.py": ("Gemm(_TENSOR_GRAD_DELAYED, _TENSOR_DELAYED),\n            ),", RECIPE),
    "octavo/config/optimizers.py": ("source=\"'octavo[adam8bit]'\",\n            ),", OPTIMIZER),
    "octavo/data/file_formats.py": ('package="pyarrow",\n            ),', FORMAT),
}

ASKS = """
import gzip, json
from pathlib import Path

import torch
from octavo import config, preflight
from octavo.commands.doctor.machine_checks import _OPTIONAL
from octavo.commands.prepare import _parser
from octavo.config.option_help import help_text, page
from octavo.data.corpus_files import find_files, read_documents
from octavo.float8 import convert_to_float8_training
from octavo.optim.optimizer import build_optimizer
from octavo.train.memory_check import bytes_per_parameter

def told(*argv, processes=1):
    try:
        preflight.check(config.load(argv), world_size=processes)
    except config.ConfigError as error:
        return str(error)

nadam = "--optimizer.name=NAdam"
loop = "--optimizer.implementation=for-loop"
job = config.load(["--model.converters=float8", "--float8.recipe_name=rows_of_64", nadam, loop])

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))

def step(model, optimizer):
    model(torch.linspace(-1, 1, 16 * 64).view(16, 64)).square().sum().backward()
    optimizer.step()
    return model[0].weight.detach()

trained = convert_to_float8_training(model(), config=job.float8.recipe_name)
kind = type(trained[0]).__name__, trained[0].recipe.name
after = step(trained, build_optimizer(trained, job.optimizer))
plain = model()
o = job.optimizer
values = dict(lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, foreach=False)
wanted = step(plain, torch.optim.NAdam(plain.parameters(), **values))
again = model()
same = step(again, build_optimizer(again, job.optimizer))

Path("poems").mkdir()
Path("poems/a.poem").write_text("one\\ntwo\\n")
Path("poems/b.poem.gz").write_bytes(gzip.compress(b"three\\n"))
Path("poems/c.poem").write_bytes(b"four\\n\\xff\\n")
found = find_files(Path("poems"))
try:
    list(read_documents(found[2]))
except config.ConfigError as error:
    bad = str(error)
print(json.dumps({
    "recipe": told("--model.converters=float8", "--float8.recipe_name=rows_of_64"),
    "recipe on the help": "rows_of_64" in help_text("x") and "rows_of_64" in page(),
    "layer": kind,
    "recipe changes the step": bool((after != wanted).any()) and torch.allclose(after, wanted, atol=1e-2),
    "optimizer on the help": "AdamW8bit,NAdam" in help_text("x") and "AdamW8bit, NAdam" in page(),
    "optimizer": torch.equal(same, wanted),
    "bytes": bytes_per_parameter(job),
    "package": told(nadam, loop),
    "implementation": told(nadam, "--optimizer.implementation=fused"),
    "shards": told(nadam, loop, processes=2),
    "state dtype": told(nadam, loop, "--optimizer.state_dtype=bfloat16"),
    "weights": told(nadam, loop, "--training.dtype=bfloat16"),
    "documents": [text for file in found[:2] for text in read_documents(file)],
    "record": bad,
    "format on the help": ".parquet or .poem, file or folder" in page()
    and ".poem (one per verse); .gz and .zst of these" in _parser().format_help(),
    "dataset": told("--training.dataset=poems"),
}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a copy of octavo says that has three rows more."""
    return ask_edited_copy(tmp_path_factory.mktemp("copy"), EDITS, ASKS)


@pytest.mark.parametrize(
    ("what", "answer"),
    [
        ("recipe", None),
        ("recipe on the help", True),
        ("layer", ["Float8Linear", "rows_of_64"]),
        ("recipe changes the step", True),
        ("optimizer on the help", True),
        ("optimizer", True),
        ("bytes", 16),
        ("package", "optimizer.name = NAdam (--optimizer.name) needs the package lacking"),
        (
            "implementation",
            "optimizer.implementation = fused (--optimizer.implementation): NAdam has only for-loop and "
            "foreach",
        ),
        (
            "shards",
            "optimizer.name = NAdam (--optimizer.name) needs whole parameters, because it is new",
        ),
        (
            "state dtype",
            "--optimizer.state_dtype would have no effect: only AdamW has a choice of state dtype",
        ),
        (
            "weights",
            "optimizer.name = NAdam (--optimizer.name) rounds weights to nearest, so that training.dtype = "
            "bfloat16 (--training.dtype) would lose small updates",
        ),
        ("documents", ["one\n", "two\n", "three\n"]),
        ("record", "poems/c.poem, verse 2: byte 0 (0xff) is not UTF-8"),
        ("format on the help", True),
        ("dataset", None),
    ],
)
def test_a_row_is_read_checked_listed_and_used(answers: dict[str, Any], what: str, answer: object) -> None:
    told = answers[what]
    assert answer in told if isinstance(answer, str) else told == answer
