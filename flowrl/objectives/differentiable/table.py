"""Which objectives differentiate a reward, and what each asks of a sampling chain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class DirectForm:
    """One objective. chain: it back-propagates through a chain of steps; penalty: it is charged for leaving the reference
    at every noisy step, whatever ``objective.kl`` says; noisy: its steps always draw noise; divergence: it reports how far
    the path went from the reference, in nats.
    """

    chain: bool
    penalty: bool = False
    noisy: bool = False
    divergence: bool = False


DIRECT: Mapping[str, DirectForm] = MappingProxyType(
    {
        "refl": DirectForm(chain=False),
        "draft": DirectForm(chain=True),
        "draft_lv": DirectForm(chain=True),
        "alignprop": DirectForm(chain=True),
        "ctrl": DirectForm(chain=True, penalty=True, noisy=True, divergence=True),
        "adjoint_matching": DirectForm(chain=False, noisy=True, divergence=True),
    }
)
