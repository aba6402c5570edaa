"""Every command of the pages in `PAGES` runs, unchanged or reduced as listed here.

The test fails for a command that is not listed, and for a row whose command is no longer on its page.
"""

import sys
from collections.abc import Mapping

import pytest

from tests.docs.commands import ROOT, SMALL, Elsewhere, Reduced, checkout, commands_of, files_of, run
from tests.helpers import warm

UNCHANGED = Reduced()
SHORT = f"{SMALL} --training.dataset=data/texts"  # the whole corpus takes seconds to tokenize
SHORTENED = Reduced(appended=SHORT)
# Compiled training is tested in tests/train/test_trainer.py.
EAGER = Reduced((("NGPU=8", "NGPU=1"), (" --training.compile", "")), SHORT)
TWO = Reduced((("--training.steps 20", ""),), SHORT)

README: Mapping[str, Reduced | Elsewhere] = {
    "./run_train.sh": Reduced(appended=SMALL, cold=True),
    "./run_tests.sh": Reduced(appended="-n0 -q tests/config/test_names.py", cold=True),
    "CFG=./octavo/models/llama3/train_configs/debug_model.toml": UNCHANGED,
    "NGPU=8 CONFIG_FILE=$CFG ./run_train.sh --training.compile": EAGER,
    'NGPU=8 CONFIG_FILE=$CFG ./run_train.sh --training.compile --model.converters="float8"': EAGER,
    'NGPU=8 CONFIG_FILE=$CFG ./run_train.sh --training.compile --model.converters="float8" '
    '--float8.recipe_name="rowwise"': EAGER,
    "NNODES=4 RDZV_ENDPOINT=first-node:29500 RDZV_ID=my-run NGPU=8 "
    "CONFIG_FILE=./octavo/models/llama3/train_configs/llama3_70b.toml ./run_train.sh --training.compile "
    '--model.converters="float8" --parallelism.data_parallel_replicate_degree 4': Elsewhere(
        "several machines", "tests/launch/test_launcher.py"
    ),
    ".venv/bin/octavo compare --config-file ./octavo/models/llama3/train_configs/debug_model.toml "
    "--steps 200 --recipes bf16,tensorwise,rowwise --bf16-seeds 3": Elsewhere(
        "it trains five models", "tests/commands/compare/test_compare.py"
    ),
    "./run_train.sh --training.dataset=/data/texts": Reduced((("/data", "data"),), SMALL),
    ".venv/bin/octavo prepare /data/texts --tokenizer octavo_bpe_2048 --out /data/ready "
    "--val-fraction 0.01": Reduced((("/data", "data"), ("0.01", "0.3"))),
    "./run_train.sh --training.dataset=/data/ready:0.8,shakespeare:0.2 --validation.enable "
    "--validation.dataset=/data/other": Reduced(
        (("/data/ready", "data/ready"), ("shakespeare", "data/texts"), ("/data/other", "data/other.txt")),
        f"{SMALL} --validation.steps=1",
    ),
    "./run_train.sh --training.steps 560 --checkpoint.enable": Reduced(
        ((" --training.steps 560", ""),), SHORT
    ),
    '.venv/bin/octavo generate --checkpoint outputs --prompt "ROMEO."': Reduced(
        appended="--max_new_tokens 4"
    ),
    ".venv/bin/octavo export outputs --out exported": UNCHANGED,
}

QUICKSTART: Mapping[str, Reduced | Elsewhere] = {
    "./run_train.sh": Elsewhere("the README's first command", "tests/docs/test_commands.py"),
    ".venv/bin/octavo doctor --config-file debug_model.toml": UNCHANGED,
    "CONFIG_FILE=debug_model.toml ./run_train.sh --training.steps 20": TWO,
    'CONFIG_FILE=debug_model.toml ./run_train.sh --training.steps 20 --model.converters="float8"': TWO,
    'CONFIG_FILE=debug_model.toml ./run_train.sh --training.steps 20 --model.converters="float8" '
    '--float8.recipe_name="rowwise"': TWO,
    'NGPU=2 CONFIG_FILE=debug_model.toml ./run_train.sh --training.steps 20 --model.converters="float8"': TWO,
    "./run_train.sh --job.dump_folder outputs/kept --checkpoint.enable --checkpoint.interval 20": SHORTENED,
}

TUTORIAL: Mapping[str, Reduced | Elsewhere] = {
    "CONFIG_FILE=./octavo/models/llama3/train_configs/debug_model.toml": UNCHANGED,
    **{
        command.replace("NGPU=8", "NGPU=1").replace("$CFG", "$CONFIG_FILE"): Elsewhere(
            "run as the README's, with NGPU=8", "tests/docs/test_commands.py"
        )
        for command in README
        if "$CFG" in command
    },
    "./run_train.sh --job.dump_folder outputs/long --training.steps 560 --checkpoint.enable "
    "--checkpoint.interval 100": Reduced(((" --training.steps 560", ""),), SHORT),
    '.venv/bin/octavo generate --checkpoint outputs/long --prompt "ROMEO."': Reduced(
        appended="--max_new_tokens 4"
    ),
    ".venv/bin/octavo export outputs/long --out exported": UNCHANGED,
    ".venv/bin/octavo import exported --out imported": UNCHANGED,
    "./run_train.sh --job.dump_folder outputs/continued --checkpoint.initial_load_path imported": SHORTENED,
    ".venv/bin/python examples/float8_training.py": Elsewhere(
        "it compiles for a minute", "tests/float8/test_convert.py"
    ),
}

OWN_MODEL: Mapping[str, Reduced | Elsewhere] = {
    f"{processes}./run_train.sh --experimental.custom_import bigram --model.name bigram "
    "--model.flavor small --float8.filter_fqns=head": SHORTENED
    for processes in ("", "NGPU=2 ")
} | {
    "./run_train.sh --experimental.custom_import layer_norms": Elsewhere(
        "a test trains with the page's file and checks its numbers", "tests/train/test_hooks.py"
    )
}

CONTRIBUTING: Mapping[str, Reduced | Elsewhere] = {
    "./run_tests.sh": Elsewhere("the README's second command", "tests/docs/test_commands.py"),
    "./run_tests.sh tests/float8/test_quantize.py -k rowwise -n0": UNCHANGED,
    "./run_tests.sh -m gpu": Elsewhere("a GPU", "tests/float8/kernels/test_gpu.py"),
    "./run_tests.sh --all": Elsewhere("hours", "tests/scripts/test_python_env.py"),
    ".ci/run": Elsewhere("it runs this test, too", "tests/docs/test_commands.py"),
    "python -m tests.golden.golden": Elsewhere(
        "it writes into the repository", "tests/train/test_trainer.py"
    ),
}

PAGES = {
    "README.md": README,
    "CONTRIBUTING.md": CONTRIBUTING,
    "docs/quickstart.md": QUICKSTART,
    "docs/tutorial.md": TUTORIAL,
    "docs/your_own_model.md": OWN_MODEL,
}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_listed_and_every_row_is_a_command(page):
    assert set(commands_of(ROOT / page)) == set(PAGES[page])


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_run_in_their_order(page, tmp_path):
    folder, variables = checkout(tmp_path), dict[str, str]()
    for name, content in files_of(ROOT / page).items():
        (folder / name).write_text(content)
    for command in commands_of(ROOT / page):
        entry = PAGES[page][command]
        if isinstance(entry, Reduced):
            run(entry(command), folder, variables, sys.executable if entry.cold else warm.python())


def test_the_files_that_test_other_commands_exist():
    entries = [e for rows in PAGES.values() for e in rows.values() if isinstance(e, Elsewhere)]
    assert entries
    assert [entry.tests for entry in entries if not (ROOT / entry.tests).is_file()] == []


def test_the_model_on_the_page_is_the_one_that_other_tests_train():
    shown = files_of(ROOT / "docs" / "your_own_model.md")
    assert shown["bigram.py"] == (ROOT / "tests" / "models" / "custom_model.py").read_text()
