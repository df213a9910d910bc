"""Problems, flawed demonstrations and the rule that grades completions."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.text import tasks
from flowrl.text.rollout import written

from .parts import rows_of

SUMS, SORTING = tasks.Sums(4), tasks.Sorting(4)


def judged(task: tasks.Task, number: int, texts: list[str]) -> tasks.Grades:
    tokens = rows_of(texts, tasks.longest(task))
    return tasks.grade(task, [task.problem(number)] * len(texts), tokens, written(tokens))


def test_worked_solutions() -> None:
    assert SUMS.problem(3859).prompt == "3+8+5+9=" and SUMS.problem(3859).solution == "11;16;25."
    assert SUMS.problem(7).prompt == "0+0+0+7=" and SUMS.problem(7).solution == "0;0;7."
    assert SORTING.problem(5381).prompt == "5381=" and SORTING.problem(5381).solution == "35;358;1358."


@pytest.mark.parametrize("task", [SUMS, SORTING, tasks.Sums(6)])
def test_the_longest_solution_is_the_longest(task: tasks.Task) -> None:
    numbers = range(0, task.count, 97)
    assert (
        max(len(task.problem(n).solution) for n in numbers)
        <= tasks.longest(task)
        == len(task.flawed(task.count - 1, [False] * task.turns))
    )
    assert task.count == 10 ** (task.turns + 1)
    assert len({len(task.problem(n).prompt) for n in numbers}) == 1


def test_a_slip_forgets_the_carry_of_a_large_digit_and_goes_on_from_there() -> None:
    assert SUMS.flawed(3859, [False] * 3) == "11;16;25."
    assert SUMS.flawed(3859, [True] * 3) == "1;6;5."  # 3+8 without its carry; 1+5 has none; 6+9 loses it again
    assert SUMS.flawed(3700, [True] * 3) == "0;0;0." and SUMS.flawed(3700, [False, True, True]) == "10;10;10."
    assert SUMS.flawed(6600, [True] * 3) == "12;12;12."  # 6 is no weak spot
    assert SUMS.flawed(1800, [True] * 3) == "9;9;9."  # no carry to forget
    assert SORTING.flawed(5381, [True] * 3) == "35;358;3581." and SORTING.flawed(5381, [False] * 3) == "35;358;1358."
    assert SORTING.flawed(5213, [True, True, True]) == "52;521;3521."


def test_grades_by_hand() -> None:
    texts = ["11;16;25.", "11;16;24.", "11;15;25.", "25.", "11;16;25", "11;1;6;5."]
    made = judged(SUMS, 3859, texts)
    assert made.outcome.tolist() == [1, 0, 1, 1, 0, 0]
    assert made.share.tolist() == [1, 1, 0.5, 0, 1, 0.5]
    nan = math.nan
    wanted = [[1, 1, 1], [1, 1, 0], [1, 0, 1], [1, nan, nan], [1, 1, 0], [1, 0, 0]]
    assert torch.allclose(made.turn_reward, torch.tensor(wanted), equal_nan=True)
    assert made.turn[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert made.turn[3].tolist() == [0, 0, 0, -1, -1, -1, -1, -1, -1]


def test_results_beyond_the_last_turn_count_to_the_last_one() -> None:
    made = judged(SUMS, 3859, ["1;2;3;25."])
    assert made.turn[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert made.outcome.item() == 1 and made.turn_reward[0].tolist() == [0, 0, 1]


def test_held_out_problems_are_never_drawn_for_training() -> None:
    train = {p.id for seed in range(30) for p in tasks.draw(SUMS, seed, 100)}
    test = {p.id for seed in range(8) for p in tasks.draw(SUMS, seed, 100, evaluation=True)}
    assert not train & test and len(train) > 1500 and len(test) > 300
    assert 0.09 < sum(map(tasks.held_out, range(10_000))) / 10_000 < 0.16


def test_draws_are_distinct_and_depend_on_the_seed_alone() -> None:
    first = tasks.draw(SUMS, 5, 64)
    assert len({p.id for p in first}) == 64 and first == tasks.draw(SUMS, 5, 64) != tasks.draw(SUMS, 6, 64)
    with pytest.raises(ValueError, match="count: 700 distinct problems of 10000 are too many"):
        tasks.draw(SUMS, 0, 700)


def test_the_alphabet() -> None:
    assert tasks.decode(tasks.encode("3+8=11;.")) == "3+8=11;." and tasks.decode([*tasks.encode("12"), 0, 3]) == "12"
    with pytest.raises(ValueError, match="characters 'ab' are not in the alphabet"):
        tasks.encode("1ab")
