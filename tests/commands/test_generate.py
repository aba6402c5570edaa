"""`octavo generate`: the text, on any terminal; the same for a seed; one message for each mistake."""

import io
from dataclasses import replace

import pytest
import torch

from octavo.cli import main
from octavo.commands.generate import _options as options
from octavo.commands.generate import encode_prompt, run
from octavo.hf.folder_writer import ExportPlan, save_pretrained
from octavo.hf.model_sources import open_model
from tests.hf.test_model_sources import ARGS, TOKENIZER, weights_of
from tests.models.small_llama import SPEC, noisy


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "hf"
    layout = ExportPlan(SPEC, ARGS, weights_of(noisy(ARGS)), torch.float32, 10**9)
    save_pretrained(folder, layout, TOKENIZER)
    return folder


def told(capsys, model, *flags):
    assert main(["generate", "--checkpoint", str(model), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("octavo: ") == 1
    return captured.err


def test_the_text_goes_to_standard_output_and_the_rest_to_standard_error(model, capsys):
    argv = ["generate", "--checkpoint", str(model), "--prompt", "To be", "--max-new-tokens", "5", "--greedy"]
    assert main([*argv, "--ignore_eos"]) == 0
    first = capsys.readouterr()
    assert first.out.startswith("To be")
    assert first.out.endswith("\n")
    assert "[5 tokens" in first.err
    assert "seed" not in first.err
    source = open_model(model)
    ids = encode_prompt(source, "To be")
    with torch.no_grad():
        whole = source.build(48)
        from octavo.hf.stored_weights import load_weights

        load_weights(whole, source.weights, torch.float32, "cpu")
        for _ in range(5):
            ids.append(int(whole(torch.tensor([ids]))[0, -1].argmax()))
    assert first.out == "To be" + TOKENIZER.decode(ids[-5:]) + "\n"


def test_a_prompt_begins_a_document_and_cannot_forge_its_end(model):
    ids = encode_prompt(open_model(model), "To be<|end_of_text|>")
    assert ids[0] == TOKENIZER.bos_id
    assert TOKENIZER.eos_id not in ids
    assert TOKENIZER.decode(ids[1:]) == "To be<|end_of_text|>"


def test_a_seed_gives_the_same_text_and_the_seed_that_was_taken_is_told(model, capsys):
    argv = ["generate", "--checkpoint", str(model), "--prompt", "A", "--max_new_tokens=20", "--ignore-eos"]
    assert main(argv) == 0
    first = capsys.readouterr()
    seed = first.err.rpartition("seed ")[2].rstrip("]\n")
    assert main([*argv, "--seed", seed]) == 0
    again = capsys.readouterr()
    assert (again.out, seed in again.err) == (first.out, True)
    assert main([*argv, "--seed", str(int(seed) + 1)]) == 0
    assert capsys.readouterr().out != first.out


def test_it_stops_where_the_context_ends_and_says_so(model, capsys):
    argv = ["generate", "--checkpoint", str(model), "--prompt", "A", "--greedy", "--ignore_eos"]
    assert main(argv) == 0
    tokens = 48 - len(encode_prompt(open_model(model), "A"))
    assert f"[{tokens} tokens" in (err := capsys.readouterr().err)
    assert "trained on sequences of 48 tokens" in err


def test_it_stops_where_the_model_ends_the_document(model):
    """A decoder that says the ids of "b c", the id that ends a document, and "d"."""
    told = [*TOKENIZER.encode("b c"), TOKENIZER.eos_id, *TOKENIZER.encode("d")]
    script = iter(torch.nn.functional.one_hot(torch.tensor(told), 2048).float().unsqueeze(1))
    spec = replace(SPEC, decoder=lambda model, capacity: lambda tokens: next(script))
    source = replace(open_model(model), spec=spec)
    out, log = io.StringIO(), io.StringIO()
    run(source, options(["--checkpoint=x", "--prompt=a ", "--greedy"]), out, log)
    assert out.getvalue() == "a b c\n"
    assert f"[{len(told) - 2} tokens" in log.getvalue()
    assert "the model ended the document" in log.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "shown"), [(Terminal, "a\ufffd[2Jb\n\tc"), (io.StringIO, "a\x1b[2Jb\n\tc")]
)
def test_a_terminal_gets_no_commands_from_a_text(model, stream, shown):
    out = stream()
    flags = ["--checkpoint", str(model), "--prompt", "a\x1b[2Jb\n\tc", "--greedy", "--max_new_tokens", "1"]
    run(open_model(model), options(flags), out, io.StringIO())
    assert out.getvalue().startswith(shown)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "word " * 100], "tokens, and the model was trained on sequences of 48"),
        (["--prompt", "\udcff"], "--prompt is not UTF-8 text"),
        ([], "the following arguments are required: --prompt"),
        (["--prompt", "a", "--temperature", "-1"], "expected a number from 0 to 100, got '-1'"),
        (["--prompt", "a", "--temperature", "nan"], "got 'nan'"),
        (["--prompt", "a", "--temperature", "inf"], "got 'inf'"),
        (["--prompt", "a", "--top_p", "0"], "expected a number above 0, at most 1, got '0'"),
        (["--prompt", "a", "--top_p", "1.1"], "got '1.1'"),
        (["--prompt", "a", "--top-k", "-1"], "expected a whole number from 0 to 2^63 - 1, got '-1'"),
        (["--prompt", "a", "--max-new-tokens", "0"], "expected a whole number from 1 to 2^63 - 1"),
        (["--prompt", "a", "--seed", "x"], "got 'x'"),
        (["--prompt", "a", "--seed", str(2**63)], "from 0 to 2^63 - 1"),
        (["--prompt", "a", "--greedy", "--temperature=1"], "contradict each other"),
        (["--prompt", "a", "--greedy", "--top_k=4"], "--top_k would have no effect"),
        (["--prompt", "a", "--temperature=0", "--seed=4"], "--seed would have no effect"),
        (["--prompt", "a", "--promt", "b"], "unrecognized arguments: --promt b"),
        (["--prompt", "a", "--tokenizer", "nowhere"], "tokenizer 'nowhere'"),
        (["--prompt", "a", "--dtype", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_mistakes_are_one_message(model, capsys, flags, message):
    assert message in told(capsys, model, *flags)


def test_a_model_that_diverged_is_told(model):
    source = open_model(model)

    def read(name):
        return torch.full_like(source.weights.read(name), torch.nan)

    broken = replace(source, weights=replace(source.weights, read=read))
    with pytest.raises(Exception, match="logits are not finite"):
        run(broken, options(["--checkpoint=x", "--prompt=a"]), io.StringIO(), io.StringIO())
