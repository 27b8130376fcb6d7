"""The cells of a step without stages: a micro-batch's way through the whole model and back, differentiated as one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.model.shards import widened
from moejax.pipeline.carry import Carry, Outcome, Row, with_outcome
from moejax.pipeline.pools import varying, zero_results, zeros


@dataclass(frozen=True)
class WholePasses:
    """The cells of `schedule.unpiped`, and those of its forwards alone."""

    objective: Callable[[Any, Array], tuple[Array, Any]]  # (model, micro-batch) -> (objective, sums)
    model: Any  # a pytree of the weights, of any floating-point dtypes, varying over every mesh axis

    def start(self, record: Array) -> Carry:
        """Empty sums."""
        sums = zero_results(self.objective, widened(self.model), jnp.zeros((), jnp.int32))
        return varying(Carry(jnp.zeros(0), [], [], [], [], Outcome(None, zeros(self.model), None, sums, record)))

    def run(self, kind: tuple[str, ...], carry: Carry, row: Row) -> Carry:
        """A forward and its backward; or the forward."""
        model = widened(self.model)
        if kind == ("F",):
            _, sums = self.objective(model, row.f_microbatch)
        else:
            dmodel, sums = jax.grad(self.objective, has_aux=True)(model, row.f_microbatch)
            carry = with_outcome(carry, dextras=jax.tree.map(jnp.add, carry.outcome.dextras, dmodel))
        return with_outcome(carry, sums=jax.tree.map(jnp.add, carry.outcome.sums, sums))
