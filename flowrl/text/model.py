"""The tiny causal language model, its critic, and their supervised start. Everything is made on the spot, offline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl import rng
from flowrl.text import tasks
from flowrl.text.config import Model, Pretraining

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, LlamaModel


def build(spec: Model, positions: int, seed: int) -> LlamaForCausalLM:
    """Make a Llama with random weights that depend on ``seed`` alone. positions: longest prompt plus completion."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tasks.VOCABULARY, hidden_size=spec.hidden, intermediate_size=3 * spec.hidden,
        num_hidden_layers=spec.layers, num_attention_heads=spec.heads, max_position_embeddings=positions,
        initializer_range=spec.hidden**-0.5, pad_token_id=tasks.PAD, bos_token_id=None, eos_token_id=tasks.END,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.key(seed, 0, stream="initial"))
        return LlamaForCausalLM(config)


class Critic(nn.Module):
    """A value network of its own: a copy of the policy's body, and a head that starts at 0."""

    def __init__(self, body: LlamaModel) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """Value of the state before each token: float32 [B, T]. prompt: int64 [B, P]; tokens: int64 [B, T]."""
        hidden = self.body(torch.cat([prompt, tokens[:, :-1]], dim=1)).last_hidden_state
        value: Tensor = self.head(hidden[:, prompt.shape[1] - 1 :]).squeeze(-1)
        return value


def token_logits(model: LlamaForCausalLM, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits of each completion token: float32 [B, T, V]. Padding stands on the right and attention is causal."""
    logits: Tensor = model(torch.cat([prompt, tokens[:, :-1]], dim=1)).logits
    return logits[:, prompt.shape[1] - 1 :].float()


def log_probs(model: LlamaForCausalLM, prompt: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion token and entropy of its distribution: float32 [B, T] each, in nats."""
    log_p = token_logits(model, prompt, tokens).log_softmax(-1)
    return log_p.gather(-1, tokens[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def prompts(problems: Sequence[tasks.Problem]) -> Tensor:
    """Tokens of the prompts: int64 [B, P]."""
    return torch.tensor([tasks.encode(p.prompt) for p in problems])


def demonstrations(task: tasks.Task, problems: Sequence[tasks.Problem], slips: Tensor) -> Tensor:
    """Tokens of flawed solutions, padded on the right: int64 [B, longest]. slips: bool [B, S], where one may slip."""
    length, rows = tasks.longest(task), slips.tolist()
    texts = [task.flawed(p.id, row) for p, row in zip(problems, rows, strict=True)]
    return torch.tensor([tasks.encode(text.ljust(length, "_")) for text in texts])


def pretrain(model: LlamaForCausalLM, task: tasks.Task, settings: Pretraining) -> float:
    """Teach flawed solutions of training problems for a fixed number of steps; return the last loss, nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(settings.steps):
        problems = tasks.draw(task, rng.key(settings.seed, step, stream="sampler"), settings.batch)
        slip_key = torch.Generator().manual_seed(rng.key(settings.seed, step, stream="perturb"))
        draws = torch.rand(settings.batch, task.turns, generator=slip_key)
        tokens = demonstrations(task, problems, draws < settings.slip)
        nats = F.cross_entropy(
            token_logits(model, prompts(problems), tokens).flatten(0, 1), tokens.flatten(), reduction="none"
        )
        loss = nats[tokens.flatten() != tasks.PAD].mean()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / 50) * (1 - step / settings.steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(loss.detach())
