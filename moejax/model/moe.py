"""The mixture-of-experts layer (arXiv:2412.19437, section 2.1.2). No token is dropped.

B sequences of S tokens, T = B * S, D model dim, E routed experts, F their width, G = 2 * F, K experts per token.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from moejax.config import MeshConfig, ModelConfig
from moejax.model.layers import MLP, matrix
from moejax.model.shards import BESIDE_EXPERTS, SHARDS
from moejax.ops.hops import plan_exchange
from moejax.ops.placement import to_replicas
from moejax.ops.rounds import exchanged_swiglu
from moejax.ops.routing import balance_loss, expert_counts, route


class RouterBias(nnx.Variable):
    """The load-balancing bias of a gate: saved with the parameters, never differentiated, never decayed."""


class Replicas(nnx.Variable):
    """Where the experts of a model that is served lie, some of them several times (`moejax.ops.placement`)."""


@jax.tree_util.register_dataclass
@dataclass
class BlockStats:
    """What an MoE layer reports of one forward pass."""

    counts: Array  # int32 [E]: tokens sent to each expert; they sum to T * K
    balance_loss: Array  # float32 []: weighted; the mean over the sequences
    rounds: Array  # int32 []: of the exchange that brought each token to all of its experts; 1 if its slots sufficed


class MoE(nnx.Module):
    """A gate, the routed experts it picks for each token, and experts that all tokens share."""

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig, mesh: MeshConfig, fp8: bool = False):
        m, dim, std = cfg.moe, cfg.hidden_size, cfg.init_std
        self.router_DE = matrix(rngs, (dim, m.num_experts), std, P(SHARDS, None), gather="fp32")
        self.router_bias = RouterBias(jnp.zeros((m.num_experts,), jnp.float32)) if m.gate == "noaux_tc" else None
        gate_up, down = (m.num_experts, dim, 2 * m.expert_width), (m.num_experts, m.expert_width, dim)
        self.gate_up_EDG = matrix(rngs, gate_up, std, P("expert", BESIDE_EXPERTS, None))
        self.down_EFD = matrix(rngs, down, std, P("expert", None, BESIDE_EXPERTS))
        self.shared = MLP(rngs, dim, m.num_shared * m.expert_width, std, fp8) if m.num_shared else None
        # of a model that is served: the places of each expert, and how many they are (`moejax.serve.placed`)
        self.places_Em: Replicas | None = nnx.data(None)
        self.count_E: Replicas | None = nnx.data(None)
        self.cfg, self.mesh, self.fp8 = m, mesh, fp8

    def __call__(self, x_BSD: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], BlockStats]:
        """Returns the sum of the shared and the chosen experts, and the load."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        ids_TK, weights_TK, scores_TE = self.route(x_TD)
        counts_E = expert_counts(ids_TK, self.cfg.num_experts)
        balance = balance_loss(scores_TE, ids_TK, x_BSD.shape[0], self.cfg)
        if self.places_Em is not None and self.count_E is not None:
            ids_TK = to_replicas(ids_TK, self.places_Em[...], self.count_E[...])
        mesh = self.mesh
        exchange = plan_exchange(self.cfg, len(x_TD), mesh.expert, mesh.expert_nodes, mesh.exchange_slack, self.fp8)
        experts = self.gate_up_EDG[...], self.down_EFD[...]
        y_TD, rounds = exchanged_swiglu(x_TD, weights_TK, ids_TK, *experts, exchange)
        if self.shared is not None:
            y_TD += self.shared(x_TD)
        stats = BlockStats(counts_E, balance, rounds.max(initial=1))
        return y_TD.reshape(x_BSD.shape), stats

    def route(self, x_TD: Float[Array, "T D"]) -> tuple[Int[Array, "T K"], Float[Array, "T K"], Float[Array, "T E"]]:
        """The experts of each token, their weights, and the affinities of all; see `moejax.ops.routing.route`."""
        logits_TE = jnp.dot(x_TD.astype(jnp.float32), self.router_DE[...], precision=jax.lax.Precision.HIGHEST)
        bias_E = None if self.router_bias is None else self.router_bias[...]
        return route(checkpoint_name(logits_TE, "router_logits"), bias_E, self.cfg)
