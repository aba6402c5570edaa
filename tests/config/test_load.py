"""From TOML and flags to values: precedence, spellings, types."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.config import ConfigError, JobConfig, load
from octavo.config.config_file import TRAIN_CONFIGS, shipped_configs
from octavo.config.schema import ALIASES, SECTIONS
from octavo.config.toml import key_lines

TomlFile = Callable[[str], str]


@pytest.fixture
def toml(tmp_path: Path) -> TomlFile:
    """Writes a TOML file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "job.toml"
        path.write_text(text)
        return str(path)

    return write


def message(argv: list[str]) -> str:
    """The error that loading `argv` ends in."""
    with pytest.raises(ConfigError) as caught:
        load(argv)
    return str(caught.value)


def test_defaults_without_file_or_flags() -> None:
    job = load([])
    assert job.to_dict() == JobConfig().to_dict()
    assert job.given == {}


def test_flag_beats_file_beats_default(toml: TomlFile) -> None:
    path = toml("[training]\nsteps = 7\nseq_len = 64\n")
    job = load(["--job.config_file", path, "--training.steps", "9"])
    assert (job.training.steps, job.training.seq_len, job.training.local_batch_size) == (9, 64, 8)
    assert job.given == {"job.config_file": "cli", "training.steps": "cli", "training.seq_len": "toml"}
    assert job.where["training.steps"] == "--training.steps"
    assert job.where["training.seq_len"] == f"{path}:3"


@pytest.mark.parametrize(
    "option", ["--job.config_file", "--job.config-file", "--config_file", "--config-file"]
)
@pytest.mark.parametrize("joined", [True, False])
def test_spellings_of_the_config_file(toml: TomlFile, option: str, joined: bool) -> None:
    path = toml("[training]\nsteps = 7\n")
    job = load([f"{option}={path}"] if joined else [option, path])
    assert job.training.steps == 7
    assert job.job.config_file == path


FLAGS = [
    (["--training.seq_len", "128"], "training.seq_len", 128),
    (["--training.seq_len=128"], "training.seq_len", 128),
    (["--training.seq-len", "128"], "training.seq_len", 128),
    (["--lr-scheduler.warmup-steps=3"], "lr_scheduler.warmup_steps", 3),
    (["--training.seq_len=1_024"], "training.seq_len", 1024),
    (["--training.global_batch_size", "-1"], "training.global_batch_size", -1),
    (["--training.global_batch_size=-1"], "training.global_batch_size", -1),
    (["--training.steps", "1", "--training.steps", "2"], "training.steps", 2),
    (["--optimizer.lr", "3e-4"], "optimizer.lr", 3e-4),
    (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
    (["--optimizer.lr=+.5E+1"], "optimizer.lr", 5.0),
    (["--optimizer.lr=5."], "optimizer.lr", 5.0),
    (["--lr_scheduler.decay_ratio", "None"], "lr_scheduler.decay_ratio", None),
    (["--float8.recipe_name=none"], "float8.recipe_name", None),
    (["--job.description", "two words = one value"], "job.description", "two words = one value"),
    (["--job.description="], "job.description", ""),
    (["--job.description=--training.steps"], "job.description", "--training.steps"),
    (["--job.description", "--not.a.flag"], "job.description", "--not.a.flag"),
    (["--model.converters=float8"], "model.converters", ["float8"]),
    (["--model.converters", "float8"], "model.converters", ["float8"]),
    (["--model.converters="], "model.converters", []),
    (["--float8.filter_fqns=output,wk"], "float8.filter_fqns", ["output", "wk"]),
    (["--float8.filter_fqns", " output , wk, "], "float8.filter_fqns", ["output", "wk"]),
    (["--compile.components=model,loss"], "compile.components", ["model", "loss"]),
    (["--training.compile"], "compile.enable", True),
    (["--compile.enable"], "compile.enable", True),
    (["--training.compile=true"], "compile.enable", True),
    (["--training.compile", "true"], "compile.enable", True),
    (["--training.compile", "--training.no-compile"], "compile.enable", False),
    (["--training.compile", "--training.no_compile"], "compile.enable", False),
    (["--training.compile", "--no-training.compile"], "compile.enable", False),
    (["--training.compile", "--training.compile=false"], "compile.enable", False),
    (["--training.no-compile=false"], "compile.enable", True),
    (["--training.compile", "--compile.enable"], "compile.enable", True),
    (["--checkpoint.enable_checkpoint"], "checkpoint.enable", True),
    (["--training.batch_size=3"], "training.local_batch_size", 3),
    (["--model.tokenizer_path=x"], "model.hf_assets_path", "x"),
]


@pytest.mark.parametrize(("argv", "key", "value"), FLAGS)
def test_flag(argv: list[str], key: str, value: object) -> None:
    job = load(argv)
    assert job.get(key) == value
    assert type(job.get(key)) is type(value)
    assert job.given == {key: "cli"}


TOML = [
    ("[training]\nseq-len = 64", "training.seq_len", 64),
    ("[lr-scheduler]\nwarmup-steps = 3", "lr_scheduler.warmup_steps", 3),
    ("training.seq_len = 64", "training.seq_len", 64),
    ("training = { seq_len = 64 }", "training.seq_len", 64),
    ("[optimizer]\nlr = 1", "optimizer.lr", 1.0),
    ("[training]\ncompile = true", "compile.enable", True),
    ("[compile]\nenable = true", "compile.enable", True),
    ("[checkpoint]\nenable_checkpoint = true", "checkpoint.enable", True),
    ("[training]\nbatch_size = 3", "training.local_batch_size", 3),
    ("[model]\ntokenizer_path = 'x'", "model.hf_assets_path", "x"),
    ("[model]\nconverters = ['float8']", "model.converters", ["float8"]),
    ("[model]\nconverters = 'float8'", "model.converters", ["float8"]),
    ("[model]\nconverters = ''", "model.converters", []),
    ("[float8]\nfilter_fqns = 'output, wk'", "float8.filter_fqns", ["output", "wk"]),
    ("[float8]\nfilter_fqns = [\n 'output',\n 'wk',\n]", "float8.filter_fqns", ["output", "wk"]),
    ("\ufeff[training]\r\nseq_len = 64\r\n", "training.seq_len", 64),
]


@pytest.mark.parametrize(("text", "key", "value"), TOML)
def test_toml(toml: TomlFile, text: str, key: str, value: object) -> None:
    job = load(["--config_file", toml(text)])
    assert job.get(key) == value
    assert type(job.get(key)) is type(value)
    assert job.given[key] == "toml"


@pytest.mark.parametrize("section", ["validation", "memory_estimation", "fault_tolerance", "experimental"])
def test_an_empty_section_is_allowed(toml: TomlFile, section: str) -> None:
    assert load(["--config_file", toml(f"[{section}]\n")]).to_dict() == {
        **JobConfig().to_dict(),
        "job": {**JobConfig().to_dict()["job"], "config_file": toml(f"[{section}]\n")},
    }


def test_a_flag_turns_off_what_the_file_turned_on_in_its_other_spelling(toml: TomlFile) -> None:
    path = toml("[compile]\nenable = true\n[checkpoint]\nenable_checkpoint = true\n")
    job = load(["--config_file", path, "--training.no-compile", "--checkpoint.no-enable"])
    assert (job.compile.enable, job.checkpoint.enable) == (False, False)


def test_agreeing_spellings_are_allowed(toml: TomlFile) -> None:
    path = toml("[training]\ncompile = true\n[compile]\nenable = true\n")
    assert load(["--config_file", path]).compile.enable is True


@pytest.mark.parametrize(
    ("flags", "text", "parts"),
    [
        (
            ["--training.compile", "--compile.no-enable"],
            "",
            ["--compile.no-enable", "training.compile = true"],
        ),
        (["--training.batch_size=2", "--training.local_batch_size=3"], "", ["= 3", "= 2", "same setting"]),
        ([], "[training]\ncompile = true\n[compile]\nenable = false\n", [":4:", ":2)", "contradicts"]),
    ],
)
def test_contradicting_spellings_are_refused(
    toml: TomlFile, flags: list[str], text: str, parts: list[str]
) -> None:
    told = message([f"--config_file={toml(text)}", *flags])
    assert all(part in told for part in parts), told


def test_each_alias_is_a_second_name_and_not_a_key() -> None:
    for (section, key), home in ALIASES.items():
        assert key not in SECTIONS[section]
        assert home[1] in SECTIONS[home[0]]


def test_lines_of_keys() -> None:
    text = (
        "# a comment\n"
        "top.dotted = 1\n"
        "[a]\n"
        "\n"
        'long = """\n'
        "[not.a.table]\n"
        "x = 1\n"
        '"""\n'
        "list = [  # a comment with ]\n"
        "  1,\n"
        "  2,\n"
        "]\n"
        "last = 2\n"
        "[b.c]\n"
        "last = 3\n"
    )
    lines = key_lines(text)
    assert lines["top", "dotted"] == 2
    assert lines[("a",)] == 3
    assert lines["a", "long"] == 5
    assert lines["a", "list"] == 9
    assert lines["a", "last"] == 13
    assert lines["b", "c", "last"] == 15
    assert not any("x" in path for path in lines)


@pytest.mark.parametrize(
    "text",
    [
        "[a]\n" + "".join(f"k{number} = {number}\n" for number in range(20_000)),
        "[a]\nlong = [\n" + "1,\n" * 4000 + "]\nlast = 1\n",
        '[a]\nlong = """\n' + '[x] = {"\n' * 4000 + '"""\nlast = 1\n',
        "".join(f"[a.b{number}]\nx = 1\n" for number in range(5000)),
        "[a." + ".".join("b" * 100) + "]\n" + "".join(f"k{number}.x = 1\n" for number in range(3000)),
    ],
    ids=["keys", "array", "string", "sections", "dots"],
)
def test_every_part_of_a_large_file_is_parsed_once(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    loads = tomllib.loads
    monkeypatch.setattr(tomllib, "loads", lambda part: parsed.append(len(part)) or loads(part))
    key_lines(text)
    assert 0 < sum(parsed) <= len(text)


STRINGS = r"""
[a]
one = 'a [ b'  # {
two = "\"[ '"
three = ["]", '''
]''', '''x'''', 1]
four = '''
] '' "
five = 5''''
six = [{x = ']'}, {y = "}"}]
seven = 7
"""


def test_strings_hide_brackets_quotes_and_line_ends() -> None:
    names = ("one", "two", "three", "four", "six", "seven")
    assert tuple(tomllib.loads(STRINGS)["a"]) == names
    lines = key_lines(STRINGS)
    assert [lines["a", name] for name in names] == [3, 4, 5, 7, 10, 11]


@pytest.mark.parametrize("path", shipped_configs().values(), ids=lambda path: path.name)
def test_shipped_config_loads_and_says_what_it_is(path: Path) -> None:
    load(["--job.config_file", str(path)])
    comment = path.read_text().partition("\n[")[0]
    assert all(line.startswith("#") for line in comment.strip().splitlines())
    assert "./run_train.sh" in comment


def test_values_of_the_shipped_configs() -> None:
    """The recipes that users know from tutorials; changing one silently would change their runs."""
    expected = {
        "llama3_8b": ("8B", "./assets/hf/Llama-3.1-8B", 8192, 3e-4, 200, 1000, "c4", "selective", []),
        "llama3_70b": ("70B", "./assets/hf/Llama-3.1-70B", 8192, 1.5e-4, 200, 1000, "c4", "full", []),
        "llama3_405b": (
            "405B",
            "./assets/hf/Llama-3.1-405B",
            8192,
            8e-5,
            600,
            3000,
            "c4",
            "full",
            ["float8"],
        ),
    }
    for name, values in expected.items():
        job = load([f"--config_file={TRAIN_CONFIGS / name}.toml"])
        found = (
            job.model.flavor,
            job.model.hf_assets_path,
            job.training.seq_len,
            job.optimizer.lr,
            job.lr_scheduler.warmup_steps,
            job.training.steps,
            job.training.dataset,
            job.activation_checkpoint.mode,
            job.model.converters,
        )
        assert found == values, name
        assert job.float8.filter_fqns == ["output"], name
        large = name == "llama3_405b"  # tensor parallel within a machine, two sequences a group
        assert job.training.local_batch_size == (2 if large else 1), name
        assert job.parallelism.tensor_parallel_degree == (8 if large else 1), name


def test_the_debug_config_is_high_precision_and_the_demo_float8() -> None:
    debug, demo = (load([f"--config_file={TRAIN_CONFIGS / name}.toml"]) for name in ("debug_model", "demo"))
    assert (debug.model.converters, demo.model.converters) == ([], ["float8"])
    assert demo.float8.recipe_name == "rowwise"
    for job in (debug, demo):
        assert (job.training.seq_len, job.model.flavor, job.training.dataset) == (
            256,
            "debugmodel",
            "shakespeare",
        )
