"""Values of the states on the way of a rollout: estimates of the finished sample, and where to take them. torch only."""

from flowrl.credit.values import (
    ValuedStates,
    euler_grid,
    extrapolate,
    ode_value,
    spread_values,
    which_states,
)

__all__ = ["ValuedStates", "euler_grid", "extrapolate", "ode_value", "spread_values", "which_states"]
