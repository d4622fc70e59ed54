"""Which process writes which file of an output: all have about as much to do, and nobody waits for ever."""

import pytest

from deltaguard.models.shards import TensorInfo
from deltaguard.ranks import Ranks
from deltaguard.restoration.plan import Action, Plan, Step
from deltaguard.restoration.writing import Teams, cost, owners_in_turn


def plan(*files, others=1):
    """A plan: for each file the rows of its matrices, behind `others` tensors that no method decides."""
    steps = []
    for number, rows in enumerate(files):
        file = f"{number}.safetensors"
        for i in range(others):
            info = TensorInfo(f"{number}.norm.{i}", "F32", (16,), file, 0, 64)
            steps.append(Step(info, Action.ALIGNED, info.name, None, False, ""))
        for i, size in enumerate(rows):
            info = TensorInfo(f"{number}.{i}", "F32", (size, 16), file, 0, 64 * size)
            steps.append(Step(info, Action.RESTORE, info.name, None, False, ""))
    return Plan(tuple(steps), (), 0, 0, 0, 0), [f"{number}.safetensors" for number in range(len(files))]


def loads(made, teams, size):
    """What each rank has to do."""
    found = [0.0] * size
    for step in made.steps:
        found[teams.owners.get(step.info.name, teams.writers.get(step.info.shard))] += cost(step)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_where_there_are_enough_files_each_is_solved_by_who_writes_it(size):
    made, files = plan(*([rows] * 6 for rows in (8, 64, 8, 32, 32, 8, 64, 16, 64, 8, 32, 16)))
    teams = Teams.of(made, files, Ranks(size=size))
    assert set(teams.writers) == set(files)
    assert set(teams.writers.values()) == set(range(size))
    layers = [step for step in made.steps if step.action is Action.RESTORE]
    assert teams.owners == {step.info.name: teams.writers[step.info.shard] for step in layers}
    assert max(loads(made, teams, size)) < 1.2 * sum(map(cost, made.steps)) / size


@pytest.mark.parametrize(("count", "size"), [(1, 2), (1, 4), (2, 3), (3, 7), (2, 8)])
def test_where_there_are_fewer_files_others_solve_for_who_writes_them(count, size):
    made, files = plan(*([64] * 30 for _ in range(count)))
    teams = Teams.of(made, files, Ranks(size=size))
    assert sorted(teams.writers.values()) == list(range(count))
    helped = {rank: set() for rank in range(size)}
    for step in made.steps:
        if step.action is Action.RESTORE:
            helped[teams.owners[step.info.name]].add(step.info.shard)
    # With one file each, nobody receives from who waits for another.
    assert [len(each) for each in helped.values()] == [1] * size
    assert all(helped[rank] == {file} for file, rank in teams.writers.items())
    members = [sum(each == {file} for each in helped.values()) for file in files]
    assert max(members) - min(members) <= 1
    assert max(loads(made, teams, size)) < 1.3 * sum(map(cost, made.steps)) / count / min(members)


def test_most_help_goes_to_the_largest_file():
    made, files = plan([64] * 30, [64] * 3)
    teams = Teams.of(made, files, Ranks(size=5))
    first, second = ({teams.owners[f"{number}.{i}"] for i in range(3)} for number in (0, 1))
    assert second == {teams.writers[files[1]]}
    assert len({teams.owners[f"0.{i}"] for i in range(30)}) == 4
    assert not first & second


def test_one_process_may_write_all_and_files_without_layers_are_written_too():
    made, files = plan([64] * 4, [64] * 4, [64] * 4, [])
    teams = Teams.of(made, files, Ranks(size=3), by_first=True)
    assert set(teams.writers.values()) == {0}
    assert teams.owners == owners_in_turn(made.steps, Ranks(size=3))
    assert set(teams.owners.values()) == {0, 1, 2}
    assert set(Teams.of(made, files, Ranks(size=3)).writers) == set(files)
    assert Teams.of(made, [], Ranks(size=3)) == Teams({}, {})


def test_all_processes_come_to_the_same():
    made, files = plan([64] * 5, [8] * 9, [32])
    found = [Teams.of(made, files, Ranks(rank=rank, size=4)) for rank in range(4)]
    assert found == [found[0]] * 4
