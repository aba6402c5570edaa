"""An option is one field: what is derived from a field that is added to a copy of `schema.py`."""

import pytest

from tests.helpers.edited_copy import ask_edited_copy

FIELD = '''
    share_kept: Annotated[Share, needs.VALIDATION, SAME_LOSS, AlsoSpelled("training.kept")] = 0.25
    """Share of the samples that is kept."""
'''
ASKS = """
import json
from octavo import config, preflight
from octavo.commands.compare.runs import _loss_settings
from octavo.config.option_help import help_text, page

def told(*argv):
    try:
        preflight.check(config.load(argv), world_size=1)
    except config.ConfigError as error:
        return str(error)

good = config.load(["--config-file=job.toml", "--validation.enable", "--validation.fraction=0.1"])
print(json.dumps({
    "default": config.load([]).training.share_kept,
    "value": good.training.share_kept,
    "alias": config.load(["--training.kept=0.75"]).training.share_kept,
    "type": told("--training.share_kept=much"),
    "name": told("--training.share_keptt=1"),
    "range": told("--training.share_kept=2", "--validation.enable", "--validation.fraction=0.1"),
    "effect": told("--training.share_kept=0.5"),
    "record": good.to_dict()["training"]["share_kept"],
    "loss": "share_kept" in _loss_settings(good)["training"],
    "help": help_text("x"),
    "page": page(),
}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a copy of octavo says whose schema has one field more."""
    folder = tmp_path_factory.mktemp("copy")
    (folder / "job.toml").write_text("[training]\nshare-kept = 0.5\n")
    return ask_edited_copy(folder, {"octavo/config/schema.py": ("@dataclass\nclass Training:", FIELD)}, ASKS)


@pytest.mark.parametrize(
    ("what", "answer"),
    [
        ("default", 0.25),
        ("value", 0.5),
        ("alias", 0.75),
        ("record", 0.5),
        ("loss", False),
        ("type", "--training.share_kept: expected a number, got 'much'"),
        ("name", "--training.share_keptt: unknown flag; did you mean '--training.share_kept'?"),
        ("range", "training.share_kept = 2.0 (--training.share_kept) must be between 0 and 1"),
        ("effect", "--training.share_kept would have no effect: nothing is validated"),
    ],
)
def test_a_field_is_read_checked_and_recorded(answers: dict[str, object], what: str, answer: object) -> None:
    told = answers[what]
    assert (told.partition("; add --validation.enable")[0] if isinstance(told, str) else told) == answer


def test_a_field_is_on_the_help_and_the_page(answers: dict[str, object]) -> None:
    text = "Share of the samples that is kept."
    assert f"  --training.share_kept FLOAT\n        {text} (default: 0.25)\n" in str(answers["help"])
    facts = "a number; must be between 0 and 1; also `training.kept`."
    entry = f"- **`training.share_kept`** = `0.25`. {text} *{facts}* No effect if nothing is validated.\n"
    assert entry in str(answers["page"])
