"""A small text trainer on verifiable tasks, which assigns credit with the engine that images use.

``load`` reads a recipe (text_outcome, text_spo_chain, text_spo_tree, text_turn, text_ppo), ``train`` runs it.
"""

from flowrl.text.config import TextConfig, load
from flowrl.text.run import train
from flowrl.text.trainer import Trainer

__all__ = ["TextConfig", "Trainer", "load", "train"]
