"""TRL's own trainer with the engine's estimators: equal to TRL where TRL has the method, and it learns."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.advantage.token_terms import gtpo
from flowrl.errors import UserError
from flowrl.integrations.trl import advantages_of, trainer_with

trl = pytest.importorskip("trl", reason="pip install 'flowrl[trl]'")
ENGINE = {"name": "grpo", "options": {}, "whiten": "none", "clip": 0.0}


def parts(seed: int = 0) -> tuple[Any, Any]:
    """A GPT-2 of two layers with a character tokenizer, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *string.ascii_lowercase]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(words), n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1,
        pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokenizer


def share_of_a(completions: list[str], **_: Any) -> list[float]:
    return [c.replace(" ", "").count("a") / 8 for c in completions]


def shortness(completions: list[str], **_: Any) -> list[float | None]:
    """No value for every completion that holds a z."""
    return [None if "z" in c else 1 - len(c.replace(" ", "")) / 16 for c in completions]


def trainer(tmp_path: Path, made: type, rewards: list[Any], **arguments: Any) -> Any:
    from datasets import Dataset

    model, tokenizer = parts()
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=16, num_generations=8, max_completion_length=8,
        learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1, seed=0, beta=0.0,
        disable_tqdm=True, bf16=False, gradient_checkpointing=False,
        **{"max_steps": 2, **arguments},
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": c} for c in "bcdefghi"])
    return made(model=model, reward_funcs=rewards, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        ("grpo", {"ddof": 1, "eps": 1e-4}, {}),
        ("dr_grpo", {}, {"scale_rewards": "none"}),
        ("lite_ppo", {"ddof": 1, "eps": 1e-4}, {"scale_rewards": "batch"}),
        ("gdpo", {"ddof": 1, "eps": 1e-4}, {"multi_objective_aggregation": "normalize_then_sum"}),
    ],
)
def test_equal_to_trl_where_trl_has_the_method(
    tmp_path: Path, name: str, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """Two reward functions of unequal weight, one of them without a value for some completions."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Recorder(trl.GRPOTrainer):  # type: ignore[name-defined, misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            pairs.append((output["advantages"], output["advantages"]))
            return output

    made = trainer_with(name, options, base=Recorder)
    run = trainer(tmp_path, made, [share_of_a, shortness], reward_weights=[1.0, 0.5], max_steps=3, **arguments)
    real = run._generate_and_score_completions

    def both(inputs: Any) -> Any:
        output = real(inputs)
        pairs[-1] = (pairs[-1][0], output["advantages"])
        return output

    run._generate_and_score_completions = both
    run.train()
    assert len(pairs) >= 2 and any(theirs.abs().sum() > 0 for theirs, _ in pairs)
    for theirs, ours in pairs:
        assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["rloo", "gtpo", "reinforce_pp_baseline"])
def test_a_rule_is_learned_with_estimators_that_trl_does_not_have(tmp_path: Path, name: str) -> None:
    """[B] and [B, T] advantages; the share of a's rises from 1 in 28."""
    run = trainer(tmp_path, trainer_with(name), [share_of_a], max_steps=25)
    run.train()
    found = [row["reward"] for row in run.state.log_history if "reward" in row]
    assert sum(found[:3]) / 3 < 0.15 and sum(found[-3:]) / 3 > 0.5


def test_the_weights_of_an_estimator_reach_the_loss() -> None:
    token = torch.tensor([[1, 2, 3, 9], [1, 2, 4, 9]])
    mask = torch.ones_like(token, dtype=torch.bool)
    rewards = torch.tensor([[1.0], [0.0]])
    made = advantages_of({**ENGINE, "name": "gtpo"}, rewards, torch.ones(1), 2, mask, token)
    group = torch.zeros(2, dtype=torch.int64)
    direct = gtpo(rewards[:, 0], group, mask, token)
    assert torch.equal(made, direct.advantage * direct.weight)
    assert made[1].tolist() == [0.0, 0.0, pytest.approx(float(made[1, 2])), 0.0] and made[1, 2] < 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpro", {}, "no estimator is called 'gpro'"),
        ("gae", {}, "gae needs value, which TRL's rollout does not have"),
        ("grpo", {"dof": 1}, "grpo: no option 'dof'; did you mean 'ddof'?"),
    ],
)
def test_mistakes_are_named_before_training(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        trainer_with(name, options)
    assert message in str(error.value)
