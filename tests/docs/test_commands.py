"""Every command of `PAGES` runs, as it stands or shrunk as listed here.

A command that is not listed fails, and so does a row whose command is in no page any more.
"""

import sys
from collections.abc import Mapping

import pytest

from tests.docs.commands import ROOT, SMALL, Elsewhere, Shrunk, checkout, commands_of, files_of, run
from tests.helpers import warm

As_it_stands = Shrunk()
SHORT = f"{SMALL} --training.dataset=data/texts"  # the whole corpus takes seconds to tokenise
few = Shrunk(appended=SHORT)
# What compiling computes is the business of tests/train/test_trainer.py.
eager = Shrunk((("NGPU=8", "NGPU=1"), (" --training.compile", "")), SHORT)
two = Shrunk((("--training.steps 20", ""),), SHORT)

README: Mapping[str, Shrunk | Elsewhere] = {
    "./run_train.sh": Shrunk(appended=SMALL, cold=True),
    "./run_tests.sh": Shrunk(appended="-n0 -q tests/config/test_names.py", cold=True),
    "CFG=./octavo/models/llama3/train_configs/debug_model.toml": As_it_stands,
    "NGPU=8 CONFIG_FILE=$CFG ./run_train.sh --training.compile": eager,
    'NGPU=8 CONFIG_FILE=$CFG ./run_train.sh --training.compile --model.converters="float8"': eager,
    'NGPU=8 CONFIG_FILE=$CFG ./run_train.sh --training.compile --model.converters="float8" '
    '--float8.recipe_name="rowwise"': eager,
    "HF_TOKEN=… .venv/bin/octavo download --repo_id meta-llama/Llama-3.1-8B --assets tokenizer": Elsewhere(
        "a network and a licence", "tests/commands/download/test_download.py"
    ),
    "NGPU=8 CONFIG_FILE=./octavo/models/llama3/train_configs/llama3_8b.toml ./run_train.sh "
    '--training.compile --model.converters="float8" --float8.recipe_name="rowwise"': Shrunk(
        (("NGPU=8", "NGPU=2"), ("llama3_8b", "debug_model"), (" --training.compile", "")), SHORT
    ),
    "NNODES=4 RDZV_ENDPOINT=first-node:29500 RDZV_ID=my-run NGPU=8 "
    "CONFIG_FILE=./octavo/models/llama3/train_configs/llama3_70b.toml ./run_train.sh --training.compile "
    '--model.converters="float8" --parallelism.data_parallel_replicate_degree 4': Elsewhere(
        "several machines", "tests/launch/test_launcher.py"
    ),
    ".venv/bin/octavo compare --config-file ./octavo/models/llama3/train_configs/debug_model.toml "
    "--steps 200 --recipes bf16,tensorwise,rowwise --bf16-seeds 3": Elsewhere(
        "it trains five models; two steps of each are that file's", "tests/commands/compare/test_compare.py"
    ),
    "./run_train.sh --training.dataset=/data/texts": Shrunk((("/data", "data"),), SMALL),
    ".venv/bin/octavo prepare /data/texts --tokenizer octavo_bpe_2048 --out /data/ready "
    "--val-fraction 0.01": Shrunk((("/data", "data"), ("0.01", "0.3"))),
    "./run_train.sh --training.dataset=/data/ready:0.8,shakespeare:0.2 --validation.enable "
    "--validation.dataset=/data/other": Shrunk(
        (("/data/ready", "data/ready"), ("shakespeare", "data/texts"), ("/data/other", "data/other.txt")),
        f"{SMALL} --validation.steps=1",
    ),
    "./run_train.sh --training.steps 560 --checkpoint.enable": Shrunk(
        ((" --training.steps 560", ""),), SHORT
    ),
    '.venv/bin/octavo generate --checkpoint outputs --prompt "ROMEO."': Shrunk(appended="--max_new_tokens 4"),
    ".venv/bin/octavo export outputs --out exported": As_it_stands,
}

QUICKSTART: Mapping[str, Shrunk | Elsewhere] = {
    "./run_train.sh": Elsewhere("the README's first command", "tests/docs/test_commands.py"),
    ".venv/bin/octavo doctor --config-file debug_model.toml": As_it_stands,
    "CONFIG_FILE=debug_model.toml ./run_train.sh --training.steps 20": two,
    'CONFIG_FILE=debug_model.toml ./run_train.sh --training.steps 20 --model.converters="float8"': two,
    'CONFIG_FILE=debug_model.toml ./run_train.sh --training.steps 20 --model.converters="float8" '
    '--float8.recipe_name="rowwise"': two,
    'NGPU=2 CONFIG_FILE=debug_model.toml ./run_train.sh --training.steps 20 --model.converters="float8"': two,
    "./run_train.sh --job.dump_folder outputs/kept --checkpoint.enable --checkpoint.interval 20": few,
}

TUTORIAL: Mapping[str, Shrunk | Elsewhere] = {
    "CONFIG_FILE=./octavo/models/llama3/train_configs/debug_model.toml": As_it_stands,
    **{
        command.replace("NGPU=8", "NGPU=1").replace("$CFG", "$CONFIG_FILE"): Elsewhere(
            "run as the README's, with NGPU=8", "tests/docs/test_commands.py"
        )
        for command in README
        if "$CFG" in command
    },
    "./run_train.sh --job.dump_folder outputs/long --training.steps 560 --checkpoint.enable "
    "--checkpoint.interval 100": Shrunk(((" --training.steps 560", ""),), SHORT),
    '.venv/bin/octavo generate --checkpoint outputs/long --prompt "ROMEO."': Shrunk(
        appended="--max_new_tokens 4"
    ),
    ".venv/bin/octavo export outputs/long --out exported": As_it_stands,
    ".venv/bin/octavo import exported --out imported": As_it_stands,
    "./run_train.sh --job.dump_folder outputs/continued --checkpoint.initial_load_path imported": few,
    ".venv/bin/python examples/float8_training.py": Elsewhere(
        "it compiles for a minute", "tests/float8/test_convert.py"
    ),
}

OWN_MODEL: Mapping[str, Shrunk | Elsewhere] = {
    f"{processes}./run_train.sh --experimental.custom_import bigram --model.name bigram "
    "--model.flavor small --float8.filter_fqns=head": few
    for processes in ("", "NGPU=2 ")
}

CONTRIBUTING: Mapping[str, Shrunk | Elsewhere] = {
    "./run_tests.sh": Elsewhere("the README's second command", "tests/docs/test_commands.py"),
    "./run_tests.sh tests/float8/test_quantize.py -k rowwise -n0": As_it_stands,
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
        how = PAGES[page][command]
        if isinstance(how, Shrunk):
            run(how(command), folder, variables, sys.executable if how.cold else warm.python())


def test_what_runs_elsewhere_runs_there():
    rows = [how for rows in PAGES.values() for how in rows.values() if isinstance(how, Elsewhere)]
    assert rows
    assert [row.tests for row in rows if not (ROOT / row.tests).is_file()] == []


def test_the_model_on_the_page_is_the_one_that_other_tests_train():
    shown = files_of(ROOT / "docs" / "your_own_model.md")
    assert shown == {"bigram.py": (ROOT / "tests" / "models" / "custom_model.py").read_text()}
