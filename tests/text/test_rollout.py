"""Sampling: the right distribution, prefixes kept, value rollouts from the right place, and every token counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.text import model as models
from flowrl.text import rollout, tasks
from flowrl.text.config import Chain, Model, Rollout, Tree

from .parts import Fixed, rows_of

SUMS = tasks.Sums(4)
STEPS = tasks.longest(SUMS)
PROBLEMS = [SUMS.problem(n) for n in (3859, 1234, 9999)]


def by_rule(problems: Any, tokens: Tensor, mask: Tensor) -> tasks.Grades:
    return tasks.grade(SUMS, problems, tokens, mask)


def first_is_one(problems: Any, tokens: Tensor, mask: Tensor) -> tasks.Grades:
    made = by_rule(problems, tokens, mask)
    return tasks.Grades((tokens[:, 0] == tasks.encode("1")[0]).float(), made.turn, made.turn_reward, made.share)


def sampler(model: Any, judge: rollout.Judge = by_rule, seed: int = 0, **settings: Any) -> rollout.Sampler:
    return rollout.Sampler(model, judge, Rollout(**settings), STEPS, seed)


def test_greedy_generation_equals_full_forward_passes() -> None:
    net = models.build(Model(hidden=16, layers=2, heads=2), 32, seed=3)
    prompt = models.prompts(PROBLEMS)
    given = rows_of(["11;1", "99", "4;4"], STEPS)
    length = torch.tensor([4, 0, 2])
    made = rollout.generate(net, prompt, given, length, None)
    for row in range(3):
        tokens: list[int] = []
        for t in range(STEPS):
            with torch.no_grad():
                ids = torch.cat([prompt[row], torch.tensor(tokens, dtype=torch.int64)])[None]
                best = int(net(ids).logits[0, -1].argmax())
            tokens.append(int(given[row, t]) if t < length[row] else best)
            if tokens[-1] == tasks.END:
                break
        assert made[row].tolist() == tokens + [tasks.PAD] * (STEPS - len(tokens))


def test_log_probs_are_those_of_the_tokens() -> None:
    net = models.build(Model(hidden=16, layers=1, heads=2), 32, seed=3)
    prompt, tokens = models.prompts(PROBLEMS), rows_of(["11;16;25.", "1;2.", "9"], STEPS)
    with torch.no_grad():
        found, entropy = models.log_probs(net, prompt, tokens)
        for t in (0, 3):
            p = net(torch.cat([prompt, tokens[:, :t]], 1)).logits[:, -1].softmax(-1)
            assert torch.allclose(found[:, t].exp(), p.gather(1, tokens[:, t, None])[:, 0], atol=1e-6)
            assert torch.allclose(entropy[:, t], torch.distributions.Categorical(p).entropy(), atol=1e-5)


def test_tokens_are_drawn_with_the_models_probabilities() -> None:
    net = Fixed({"1": 0.5, "2": 0.3, ".": 0.2})
    many = [SUMS.problem(n) for n in range(100)]
    made = sampler(net, group_size=40).sample(many, 0)
    first = made.tokens[:, 0]
    for character, share in (("1", 0.5), ("2", 0.3), (".", 0.2)):
        assert abs(float((first == tasks.encode(character)[0]).float().mean()) - share) < 0.03
    assert torch.allclose(made.old_log_prob[:, 0].exp().unique(), torch.tensor([0.2, 0.3, 0.5]), atol=1e-6)


def test_noise_is_keyed_by_seed_iteration_problem_and_member() -> None:
    net = Fixed({c: 1.0 for c in "0123456789"})
    draw = sampler(net, group_size=4)
    made = draw.sample(PROBLEMS, 2).tokens
    assert torch.equal(made, draw.sample(PROBLEMS, 2).tokens)
    alone = draw.sample(PROBLEMS[1:2], 2).tokens
    assert torch.equal(alone, made[4:8])  # whatever else is in the batch
    assert len(made.unique(dim=0)) == 12
    for other in (sampler(net, seed=1, group_size=4).sample(PROBLEMS, 2), draw.sample(PROBLEMS, 3)):
        assert not torch.equal(made, other.tokens)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every continuation drawn from now on, counted by hand."""
    found: list[int] = []
    real = rollout.generate

    def spy(net: Any, prompt: Tensor, given: Tensor, length: Tensor, noise: Tensor, until: int | None = None) -> Tensor:
        tokens = real(net, prompt, given, length, noise, until)
        for row, start in zip(tokens.tolist(), length.tolist(), strict=True):
            stop = row.index(tasks.END) + 1 if tasks.END in row else (until or STEPS)
            found.append(stop - start)
        return tokens

    monkeypatch.setattr(rollout, "generate", spy)
    return found


@pytest.mark.parametrize("branching", ["none", "chain", "tree"])
def test_every_sample_and_token_is_counted(monkeypatch: pytest.MonkeyPatch, branching: Any) -> None:
    found = counted(monkeypatch)
    net = Fixed({"1": 0.4, ";": 0.3, ".": 0.3})
    chain, tree = Chain(interval=2, max_cuts=3, rollouts=5), Tree(branches=(2, 3, 2), segment=2)
    made = sampler(net, group_size=4, branching=branching, chain=chain, tree=tree).sample(PROBLEMS, 0)
    assert made.samples == len(found) and made.generated == sum(found)
    if branching == "none":
        assert made.samples == 12 and made.generated == int(made.mask.sum())
    if branching == "chain":
        cuts = int(made.segment.amax(1).sum())  # segments but the first
        assert made.samples == 12 + 5 * cuts and cuts > 0
    if branching == "tree":
        assert made.generated < int(made.mask.sum())  # shared prefixes once


@pytest.mark.parametrize("branching", ["none", "chain", "tree"])
def test_no_two_continuations_share_noise(monkeypatch: pytest.MonkeyPatch, branching: Any) -> None:
    keys: list[int] = []
    real = rollout.uniforms

    def spy(drawn: list[int], steps: int) -> Tensor:
        keys.extend(drawn)
        return real(drawn, steps)

    monkeypatch.setattr(rollout, "uniforms", spy)
    chain = Chain(interval=2, max_probability=1.0, max_cuts=3, rollouts=5)
    draw = sampler(Fixed({"1": 0.8, ".": 0.2}), group_size=6, branching=branching, chain=chain, tree=Tree(segment=2))
    assert sum(draw.sample(PROBLEMS, i).samples for i in range(2)) == len(keys) == len(set(keys))


def test_a_chain_values_the_state_before_each_segment() -> None:
    """The outcome depends on the first token alone, so every value after it is the row's own outcome."""
    net = Fixed({"1": 0.5, "2": 0.4, ".": 0.1})
    chain = Chain(interval=2, max_probability=1.0, max_cuts=3, rollouts=3)
    made = sampler(net, first_is_one, group_size=4, branching="chain", chain=chain).sample(PROBLEMS, 0)
    outcome, value, segment = made.grades.outcome, made.segment_value, made.segment
    assert value is not None and 0 < outcome.sum() < 12
    for row in range(12):
        mates = [i for i in range(12) if i // 4 == row // 4 and i != row]
        assert value[row, 0].item() == pytest.approx(sum(outcome[i].item() for i in mates) / 3)
        count = int(segment[row].max()) + 1
        assert value[row, 1 : count + 1].tolist() == [outcome[row].item()] * count
        assert value[row, count + 1 :].isnan().all()
        assert segment[row].tolist() == [min(t // 2, 2) if m else -1 for t, m in enumerate(made.mask[row].tolist())]


def test_a_value_rollout_depends_on_what_follows_its_cut() -> None:
    """The outcome is the last token before the end: early values are its probability, not the row's own outcome."""
    net = Fixed({"1": 0.45, "2": 0.45, ".": 0.1})

    def last_is_one(problems: Any, tokens: Tensor, mask: Tensor) -> tasks.Grades:
        made = by_rule(problems, tokens, mask)
        return tasks.Grades((tokens[:, -1] == tasks.encode("1")[0]).float(), made.turn, made.turn_reward, made.share)

    chain = Chain(interval=4, max_probability=1.0, max_cuts=2, rollouts=200)
    made = sampler(net, last_is_one, group_size=8, branching="chain", chain=chain).sample(PROBLEMS, 0)
    assert made.segment_value is not None
    value = made.segment_value[made.segment.amax(1) == 1, 1]
    expected = 0.9**4 * 0.45  # four tokens go on without an end, the fifth is a 1
    assert (
        len(value) > 5 and abs(float(value.mean()) - expected) < 0.03 and float((value - expected).abs().max()) < 0.15
    )


def test_a_tree_shares_prefixes_and_names_its_nodes() -> None:
    net = Fixed({c: 1.0 for c in "0123456789."})
    made = sampler(net, branching="tree", tree=Tree(branches=(2, 3, 2), segment=3)).sample(PROBLEMS, 0)
    path = made.node_path
    assert path is not None and path.shape[1] == 3 and torch.equal(path[:, 0], made.group)
    rows = [tuple(p) for p in path.tolist()]
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            for level in (1, 2):
                same = made.tokens[i, : 3 * level].tolist() == made.tokens[j, : 3 * level].tolist()
                if a[: level + 1] == b[: level + 1]:
                    assert same
                elif a[0] == b[0] and not same:
                    assert a[: level + 1] != b[: level + 1]
    early = (made.tokens[:, :3] == tasks.END).any(1)
    late = ~(made.tokens[:, :6] == tasks.END).any(1)
    assert early.any() and late.any()
    for i in early.nonzero().flatten().tolist():
        assert rows.count(rows[i]) == 1  # a row that has ended is not branched again
    for i in late.nonzero().flatten().tolist():
        assert rows.count(rows[i]) == 2
    wanted = [[min(t // 3, 2) if m else -1 for t, m in enumerate(row)] for row in made.mask.tolist()]
    assert made.segment.tolist() == wanted
