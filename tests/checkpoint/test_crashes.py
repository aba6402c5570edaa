"""A run that is killed and restarted by the same command ends bitwise like an uninterrupted run.

Losses, parameters and optimizer state are compared. The sweep over random times is slow:
`pytest -m slow tests/checkpoint/test_crashes.py`.
"""

import random
import re
import shutil

import pytest

from octavo.checkpoint import latest
from octavo.checkpoint.store import published_steps
from tests.checkpoint.crashes import FLAGS, crashes, crashes_after, final_hash, kill_at, last_step
from tests.helpers import launching

SYNC = {}
ASYNC = {"checkpoint.async_mode": "async"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The uninterrupted runs, by the number of processes."""
    made = {}

    def get(world):
        if world not in made:
            folder = tmp_path_factory.mktemp(f"uninterrupted-{world}")
            run = launching.train(folder, FLAGS, world=world)
            assert len(run.losses) == 26
            made[world] = run.losses, final_hash(folder)
        return made[world]

    return get


def assert_resumed_run_equals_uninterrupted(folder, flags, world, uninterrupted, at_least):
    run = launching.train(folder, flags, world=world)
    assert run.exit_codes == [0] * world
    assert f"resumed step {at_least}, " in run.log
    assert "data position exact, RNG exact" in run.log
    assert (run.losses, final_hash(folder)) == uninterrupted(world)
    assert not list((folder / "checkpoint").glob("*.tmp*"))
    assert len(published_steps(folder / "checkpoint")) == 2


# The second save, of step 6, is killed: until it is published the run resumes from step 3.
# (failpoint, step to resume from, rank to kill, visits of the failpoint by then)
SYNC_POINTS = [
    ("before write", 3, 0, 2),
    ("during write", 3, 0, 3),  # rank 0 writes a shard and .metadata each time
    ("after shard", 3, 0, 2),
    ("before manifest", 3, 0, 2),
    ("after manifest", 3, 0, 2),
    ("before rename", 3, 0, 2),
    ("after rename", 6, 0, 2),
    ("during purge", 9, 0, 1),
    ("during purge", 9, 0, 2),
]


@pytest.mark.parametrize(("point", "step", "rank", "visit"), SYNC_POINTS)
def test_killed_while_saving(point, step, rank, visit, uninterrupted, tmp_path):
    assert crashes(tmp_path, FLAGS, 1, kill_at(point, visit=visit, rank=rank))
    assert_resumed_run_equals_uninterrupted(tmp_path, FLAGS, 1, uninterrupted, step)


@pytest.mark.parametrize(
    ("point", "step", "visit"),
    [("during staging", 3, 4), ("during write", 3, 3), ("after shard", 3, 2), ("after rename", 6, 2)],
)
def test_killed_while_saving_asynchronously(point, step, visit, uninterrupted, tmp_path):
    flags = {**FLAGS, **ASYNC}
    assert crashes(tmp_path, flags, 1, kill_at(point, visit=visit, rank=0))
    assert_resumed_run_equals_uninterrupted(tmp_path, flags, 1, uninterrupted, step)


@pytest.mark.parametrize(
    ("mode", "point", "step", "rank", "visit"),
    [
        (SYNC, "after shard", 3, 0, 2),
        (SYNC, "after shard", 3, 1, 2),
        (SYNC, "before rename", 3, 0, 2),
        (SYNC, "during purge", 9, 0, 1),
        (ASYNC, "during write", 3, 1, 2),
        (ASYNC, "during staging", 3, 1, 5),
    ],
)
def test_one_of_two_is_killed(mode, point, step, rank, visit, uninterrupted, tmp_path):
    flags = {**FLAGS, **mode}
    assert crashes(tmp_path, flags, 2, kill_at(point, visit=visit, rank=rank))
    assert_resumed_run_equals_uninterrupted(tmp_path, flags, 2, uninterrupted, step)


def test_five_crashes_in_a_row_leave_one_that_verifies_at_every_instant(uninterrupted, tmp_path):
    """Checked by the saving process at each failpoint, and from outside after each crash."""
    folder, bad = tmp_path / "checkpoint", tmp_path / "bad"

    def watching(hook, since):
        def both(name):
            if since:
                try:
                    latest(folder)
                except Exception as error:
                    bad.write_text(f"{name}: {error}")
            hook(name)

        return both

    crashed_at = ["during purge", "before rename", "after rename", "after manifest", "during purge"]
    for number, point in enumerate(crashed_at):
        visit = 3 if point == "during purge" and number else 2  # files of a deleted checkpoint, or saves
        hook = watching(kill_at(point, visit=visit), since=number > 0)
        assert crashes(tmp_path, FLAGS, 1, hook), (number, point)
        assert not bad.exists(), bad.read_text()
        assert latest(folder)
    run = launching.train(tmp_path, FLAGS)
    assert (run.losses, final_hash(tmp_path)) == uninterrupted(1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [SYNC, ASYNC], ids=["sync", "async"])
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_random_times(world, mode, uninterrupted, tmp_path):
    """Fifty kills, each followed by the same command. Prints how many steps each lost."""
    flags = {**FLAGS, **mode}
    dice = random.Random(17 * world + len(mode))
    launching.train(tmp_path / "timed", flags, world=world)
    timed = tmp_path / "timed"
    ended = (latest(timed / "checkpoint") / "manifest.json").stat().st_mtime
    seconds = ended - (timed / "run.json").stat().st_mtime
    killed, lost = [], []
    for number in range(50 if world == 1 else 25):
        folder = tmp_path / str(number)
        while not crashes_after(
            folder, flags, world, dice.uniform(0, seconds), dice.choice([None, *range(world)])
        ):
            shutil.rmtree(folder)
        done = last_step(folder)
        run = launching.train(folder, flags, world=world)
        assert (run.losses, final_hash(folder)) == uninterrupted(world), number
        resumed = re.search(r"resumed step (\d+), .* data position exact, RNG exact", run.log)
        lost.append(done - (int(resumed[1]) if resumed else 0))
        killed.append(done)
        shutil.rmtree(folder)
    # Asynchronously, one more may be in flight.
    assert max(lost) <= FLAGS["checkpoint.interval"] * (2 if mode else 1)
    print(
        f"\nworld {world}, {mode or 'sync'}: killed after step {sorted(killed)}, steps lost: {sorted(lost)}"
    )
