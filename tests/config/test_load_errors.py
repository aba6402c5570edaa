"""What is refused while loading, and that the message names the place, the key and the nearest valid name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.config import ConfigError, load, torchtitan
from octavo.config.schema import ALIASES, OPTIONS, SECTIONS
from octavo.preflight import check

TITAN = "known to torchtitan, not supported: "


@pytest.fixture
def told_about(tmp_path: Path) -> Callable[..., str]:
    """The message for a TOML text (the file is called job.toml) and flags."""

    def tell(text: str | bytes, *flags: str) -> str:
        path = tmp_path / "job.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(ConfigError) as caught:
            load([f"--job.config_file={path}", *flags])
        return str(caught.value).replace(f"{tmp_path}/", "")

    return tell


TOML = [
    # names
    (
        "[training]\nseq_lenn = 1",
        "job.toml:2: training.seq_lenn: unknown key; did you mean 'training.seq_len'?",
    ),
    ("[trainig]\nseq_len = 1", "job.toml:1: [trainig]: unknown section; did you mean [training]?"),
    ("[xyzzy]\nseq_len = 1", "job.toml:1: [xyzzy]: unknown section; the sections are job, "),
    ("[optimizer]\nsteps = 1", "job.toml:2: optimizer.steps: unknown key; did you mean 'training.steps'?"),
    ("[training]\nqqqqqq = 1", "job.toml:2: training.qqqqqq: unknown key; [training] has dataset, "),
    ("[training.x]\ny = 1", "job.toml:1: training.x: unknown key"),
    (
        "steps = 5\n[training]",
        "job.toml:1: key 'steps' stands outside any section; did you mean 'training.steps'?",
    ),
    (
        '"training.steps" = 5',
        "job.toml:1: in quotes, the dot of 'training.steps' is part of a name",
    ),
    ("training = 5", "job.toml:1: 'training' is a section, not a key"),
    ("[[training]]\nsteps = 1", "job.toml:1: 'training' is a section"),
    ("[[other]]\nsteps = 1", "job.toml:1: [[other]] is an array of tables"),
    # types
    ('[training]\nsteps = "ten"', "job.toml:2: training.steps: expected an integer, got a string ('ten')"),
    ("[training]\nseq_len = 1.5", "job.toml:2: training.seq_len: expected an integer, got a number (1.5)"),
    ("[training]\nsteps = true", "job.toml:2: training.steps: expected an integer, got a boolean (true)"),
    ("[optimizer]\nlr = false", "job.toml:2: optimizer.lr: expected a number, got a boolean (false)"),
    ("[training]\ncompile = 1", "job.toml:2: training.compile: expected true or false, got an integer (1)"),
    ('[training]\ncompile = "true"', "expected true or false, got a string ('true')"),
    (
        "[model]\nconverters = 3",
        "job.toml:2: model.converters: expected a list of float8 (or one comma-separated",
    ),
    ("[float8]\nfilter_fqns = [1]", "job.toml:2: float8.filter_fqns: expected a string, got an integer (1)"),
    ("[training]\ncompile = 0x" + "f" * 5000, "expected true or false, got an integer (about 10^6020)"),
    ("[job]\ndescription = ['x']", "expected a string, got a list (['x'])"),
    ("[job]\ndescription = 2020-01-01", "expected a string, got a date or time"),
    ("[training]\nsteps = {a = 1}", "job.toml:2: training.steps: expected an integer, got a table"),
    ("[float8]\nfilter_fqns = ['a', 'a']", "job.toml:2: float8.filter_fqns: names 'a' twice"),
    ("[float8]\nrecipe_name = 3", "job.toml:2: float8.recipe_name: expected one of tensorwise, "),
    (
        "[optimizer]\nlr = 1" + "0" * 400,
        "job.toml:2: optimizer.lr: expected a number, got an integer (about 10^400)",
    ),
    ("[float8]\nfilter_fqns = '[\"a\"]'", "inside quotes a list is written without brackets"),
    ("[job]\nconfig_file = 'b.toml'", "job.toml:2: job.config_file: a file cannot name another"),
    # choices
    ('[float8]\nrecipe_name = "rowise"', "'rowise' is not one of tensorwise, rowwise, rowwise_with_gw_hp"),
    ('[float8]\nrecipe_name = "rowise"', "; did you mean 'rowwise'?"),
    ('[optimizer]\nname = "adamw"', "'adamw' is not one of Adam, AdamW, AdamW8bit; did you mean 'AdamW'?"),
    ('[model]\nconverters = "float8,mx"', "'mx' is not float8"),
    ('[checkpoint]\nasync_mode = "async_with_pinned"', "is not one of disabled, async"),
    # TOML itself
    ("[training]\nsteps = ", "job.toml:2: not valid TOML at column 9"),
    ("[float8]\n\nfilter_fqns = [\n  1,\n", "job.toml:3: not valid TOML: "),
    ("[training]\nsteps 5", "job.toml:2: not valid TOML at column 7"),
    (
        "[training]\nsteps = 1\nsteps = 2",
        "job.toml:3: not valid TOML at column 10: this key is given twice: 'steps = 2'",
    ),
    ("[training]\nsteps = 1\n[training]\nseq_len = 2", "job.toml:3: not valid TOML"),
    ('[job]\ndescription = """x', "job.toml:2: not valid TOML: Unterminated string"),
    ("[training]\nseq-len = 1\nseq_len = 2", "job.toml:3: training.seq_len: given twice"),
    (b"[job]\ndescription = '\xff'", "'job.toml' is not UTF-8 text (byte 21)"),
    ("[training]\nsteps = 1" + "0" * 5000, "job.toml: not usable TOML: "),
    ("[training]\nsteps = " + "[" * 5000 + "]" * 5000, "job.toml: not usable TOML: "),
    (b"\x00\x01", "not valid TOML"),
    # torchtitan's
    ("[training]\ncompile = true\ngc_debug = false", f"job.toml:3: training.gc_debug: {TITAN}"),
    (
        "[parallelism]\nexpert-parallel-degree = 1",
        f"job.toml:2: parallelism.expert_parallel_degree: {TITAN}",
    ),
    ("[mx]\nrecipe_name = 'mxfp8'", f"job.toml:1: [mx]: {TITAN}"),
    ("[quantize.linear.mx]\nrecipe_name = 'x'", f"job.toml:2: quantize.linear.mx.recipe_name: {TITAN}"),
    (
        "[quantize.linear.float8]\nemulat = true",
        "job.toml:2: quantize.linear.float8.emulat: unknown key; did you mean 'float8.emulate'?",
    ),
    ("[quantize]\nlinear = 1\n", f"job.toml:2: quantize.linear: {TITAN}"),
    ("[debug]\nseed = 1", f"job.toml:2: debug.seed: {TITAN}here it is training.seed"),
    ("[training.dataloader]\nnum_workers = 4", f"job.toml:1: training.dataloader: {TITAN}"),
    ("[fault_tolerance]\nenable = false", f"job.toml:2: fault_tolerance.enable: {TITAN}"),
]


@pytest.mark.parametrize(("text", "part"), TOML)
def test_toml_error(told_about: Callable[..., str], text: str, part: str) -> None:
    told = told_about(text)
    assert part in told
    assert len(told.splitlines()) == 1


FLAGS = [
    (["--training.seq_lenn", "1"], "--training.seq_lenn: unknown flag; did you mean '--training.seq_len'?"),
    (["--training.seq_lenn=1"], "--training.seq_lenn: unknown flag; did you mean '--training.seq_len'?"),
    (
        ["--trainig.seq_len", "1"],
        "--trainig.seq_len: unknown section 'trainig'; did you mean '--training.seq_len'?",
    ),
    (["--steps", "1"], "--steps: unknown flag; did you mean '--training.steps'?"),
    (["--training.warmup_step=1"], "unknown flag; did you mean '--lr_scheduler.warmup_steps'?"),
    (["--optimizer.steps=1"], "did you mean '--training.steps'?"),
    (["--xyzzy.plugh=1"], "--xyzzy.plugh: unknown section 'xyzzy'"),
    (["--training-steps=1"], "--training-steps: unknown flag; did you mean '--training.steps'?"),
    (
        ["--float8.enabled=1"],
        "--float8.enabled: unknown flag; [float8] has recipe_name, filter_fqns, emulate",
    ),
    (["--a.b.c=1"], "--a.b.c: unknown section 'a'"),
    (["--training.="], "--training.: unknown flag"),
    (["--"], "unexpected argument '--'"),
    (["10"], "unexpected argument '10'"),
    (["-x"], "unexpected argument '-x'"),
    (["--job.description", "a", "b"], "unexpected argument 'b'"),
    (["--training.steps"], "--training.steps: needs a value"),
    (["--training.steps", "--training.seq_len", "8"], "--training.steps: needs a value"),
    (["--training.steps="], "--training.steps: expected an integer, got ''"),
    (["--training.steps=ten"], "--training.steps: expected an integer, got 'ten'"),
    (["--training.steps=1.0"], "--training.steps: expected an integer, got '1.0'"),
    (["--training.steps=1e3"], "--training.steps: expected an integer, got '1e3'"),
    (["--training.steps=None"], "--training.steps: expected an integer, got 'None'"),
    (["--training.steps=٣"], "expected an integer"),
    (["--training.steps=" + "9" * 5000], "expected an integer"),
    (["--optimizer.lr=fast"], "--optimizer.lr: expected a number, got 'fast'"),
    (["--training.compile=yes"], "--training.compile: expected true or false, got 'yes'"),
    (["--training.no-compile=1"], "--training.no-compile: expected true or false, got '1'"),
    (["--training.no-steps", "1"], "has no 'no' form; write --training.steps VALUE"),
    (["--no-training.steps", "1"], "has no 'no' form; write --training.steps VALUE"),
    (["--float8.recipe-name=rowise"], "--float8.recipe-name: 'rowise' is not one of"),
    (["--float8.recipe-name=rowise"], "did you mean 'rowwise'?"),
    (["--model.converters=float8,float8"], "names 'float8' twice"),
    (["--float8.filter_fqns=['output']"], "inside quotes a list is written without brackets: a,b"),
    (["--mx.recipe_name=mxfp8"], f"--mx.recipe_name: {TITAN}"),
    (
        ["--training.data_parallel_shard_degree=2"],
        f"{TITAN}here it is parallelism.data_parallel_shard_degree",
    ),
    (["--metrics.rank_0_only"], f"--metrics.rank_0_only: {TITAN}"),
    (["--quantize.grouped_mm.float8.fqns=x"], f"--quantize.grouped_mm.float8.fqns: {TITAN}grouped products"),
    (
        ["--float8.moe_fqns=x"],
        f"--float8.moe_fqns: {TITAN}grouped products of experts stay in high precision",
    ),
    (["--optimizer.lr=1_0"], "--optimizer.lr: expected a number, got '1_0'"),
    (["--optimizer.lr", " 1"], "--optimizer.lr: expected a number, got ' 1'"),
    (["--optimizer.lr=٣"], "--optimizer.lr: expected a number, got '٣'"),
    (["--optimizer.lr=."], "--optimizer.lr: expected a number, got '.'"),
    (["--config_file=nowhere.toml"], "--config_file=nowhere.toml: no such file in "),
]


@pytest.mark.parametrize(("argv", "part"), FLAGS)
def test_flag_error(argv: list[str], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_everything_wrong_is_told_at_once(told_about: Callable[..., str]) -> None:
    told = told_about("[training]\nstepz = 1\nseq_len = 'x'\n", "--training.gc_freq=x", "--model.flavour=1B")
    assert [line.partition(": ")[0] for line in told.splitlines()] == [
        "job.toml:2",
        "job.toml:3",
        "--training.gc_freq",
        "--model.flavour",
    ]


THEIRS = {s: keys for s, keys in torchtitan.table().items() if s not in ("sections", "values")}
MISSING = [(s, key, why) for s, keys in THEIRS.items() for key, why in keys.items() if why != "same"]


def test_what_is_the_same_is_ours_and_what_is_missing_is_not() -> None:
    ours = {f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys}
    ours |= {f"{section}.{key}" for section, key in ALIASES}
    for section, keys in THEIRS.items():
        for key, why in keys.items():
            assert (f"{section}.{key}" in ours) == (why == "same"), (section, key)
    assert not set(torchtitan.table()["sections"]) & set(SECTIONS)


def test_what_moved_moved_to_a_key_of_ours() -> None:
    moved = [why.removeprefix("here it is ") for *_, why in MISSING if why.startswith("here it is ")]
    assert len(moved) > 10
    for where in moved:
        assert where.split(" ")[0].rstrip(",") in OPTIONS, where


def test_every_key_of_torchtitans_is_refused_with_its_reason(told_about: Callable[..., str]) -> None:
    keys = [(section, key, why) for section, key, why in MISSING if section != "quantize"]
    lines = {section: [f"{k} = false" for s, k, _ in keys if s == section] for section in THEIRS}
    text = "\n".join("\n".join([f"[{section}]", *its]) for section, its in lines.items() if its)
    told = [line.partition(": ")[2] for line in told_about(text).splitlines()]
    assert told == [f"{section}.{key}: {TITAN}{why}" for section, key, why in keys]
    assert all(10 < len(why) < 100 for *_, why in MISSING)


VALUES = torchtitan.table()["values"]


@pytest.mark.parametrize("setting", VALUES)
def test_every_value_of_torchtitans_is_refused_with_its_reason(setting: str) -> None:
    key, _, value = setting.partition(" = ")
    pipeline = ["--parallelism.pipeline_parallel_degree=2"] if "pipeline" in key else []
    with pytest.raises(ConfigError) as caught:
        check(load([f"--{key}={value}", *pipeline]), world_size=2)
    assert f"; {TITAN}{VALUES[setting]}" in str(caught.value).splitlines()[0]


def test_the_newer_spelling_of_float8_means_the_same(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        '[model]\nconverters = ["quantize.linear.float8"]\n[quantize.linear.float8]\nemulate = true\n'
    )
    job = load([f"--config-file={path}", "--quantize.linear.float8.filter-fqns=output"])
    assert (job.model.converters, job.float8.emulate, job.float8.filter_fqns) == (
        ["float8"],
        True,
        ["output"],
    )
    assert job.where["float8.emulate"] == f"{path}:4"
    assert load(["--model.converters=quantize.linear.float8"]).model.converters == ["float8"]


@pytest.mark.parametrize(
    "value", ['["float8", "float8"' + ', "x"' * 9000 + "]", repr("y" * 9000), repr("[" * 9000)]
)
def test_a_long_value_is_cut_short_in_its_message(value: str, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(f"[model]\nconverters = {value}\n")
    with pytest.raises(ConfigError) as caught:
        load(["--job.config_file", str(file)])
    assert len(str(caught.value)) < 1000
