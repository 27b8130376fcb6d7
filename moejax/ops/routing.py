"""Which experts a token goes to, and how their load is balanced (arXiv:2412.19437, section 2.1.2; V2 report, 2.2).

T tokens, E experts, G groups of E/G experts, K experts per token, B sequences.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import MoEConfig


def route(
    logits_TE: Float[Array, "T E"], bias_E: Float[Array, "E"] | None, cfg: MoEConfig
) -> tuple[Int[Array, "T K"], Float[Array, "T K"], Float[Array, "T E"]]:
    """Picks K experts per token and the weight of each.

    With the gate noaux_tc, `bias` moves the choice only: the weights come from the unbiased scores, so no gradient
    reaches it. Experts of unchosen groups are masked with -inf rather than 0: a negative bias can put a chosen
    expert's score below 0. The softmax gates of V2 have no bias and read none.

    Args:
        logits_TE: router outputs, float32.
        bias_E: load-balancing bias of noaux_tc, float32, updated outside the gradient.
        cfg: the gate and its sizes.

    Returns:
        ids: the experts of each token, in [0, E), best first.
        weights: combine weights, float32; with `normalize_weights` each row sums to `route_scale`.
        scores: the affinities of all experts, float32, for the balance losses.
    """
    if cfg.gate == "noaux_tc":
        assert bias_E is not None
        scores_TE = jax.nn.sigmoid(logits_TE)
        choice_TE = jax.lax.stop_gradient(scores_TE + bias_E)
    else:
        scores_TE = jax.nn.softmax(logits_TE, axis=-1)
        choice_TE = jax.lax.stop_gradient(scores_TE)
    if cfg.num_groups > 1:
        choice_TE = _limit_to_best_groups(choice_TE, cfg)
    ids_TK = jax.lax.top_k(choice_TE, cfg.top_k)[1]
    weights_TK = jnp.take_along_axis(scores_TE, ids_TK, axis=-1)
    if cfg.normalize_weights:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdims=True) + 1e-20)
    return ids_TK, weights_TK * cfg.route_scale, scores_TE


def _limit_to_best_groups(choice_TE: Float[Array, "T E"], cfg: MoEConfig) -> Float[Array, "T E"]:
    """The scores with -inf for the experts outside of each token's `top_groups` best groups."""
    grouped_TGe = choice_TE.reshape(-1, cfg.num_groups, cfg.num_experts // cfg.num_groups)
    summed = cfg.group_score_size if cfg.gate == "noaux_tc" else 1
    group_scores_TG = jax.lax.top_k(grouped_TGe, summed)[0].sum(-1)
    best_Tg = jax.lax.top_k(group_scores_TG, cfg.top_groups)[1]
    kept_TG = (best_Tg[:, :, None] == jnp.arange(cfg.num_groups)).any(1)
    return jnp.where(kept_TG[:, :, None], grouped_TGe, -jnp.inf).reshape(choice_TE.shape)


def expert_counts(ids_TK: Int[Array, "*T K"], num_experts: int) -> Int[Array, "E"]:
    """How many times each expert was picked."""
    return (ids_TK.reshape(-1)[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)


def update_bias(
    bias: Float[Array, "*L E"], counts: Int[Array, "*L E"], speed: Float[Array, ""] | float
) -> Float[Array, "*L E"]:
    """The bias after a step: up by `speed` for experts with less than the mean load, down for those with more.

    `counts` are those of the whole global batch of the step (section 2.1.2, "gamma").
    """
    counts32 = counts.astype(jnp.float32)
    return bias + speed * jnp.sign(counts32.mean(-1, keepdims=True) - counts32)


def balance_loss(
    scores_TE: Float[Array, "T E"], ids_TK: Int[Array, "T K"], num_sequences: int, cfg: MoEConfig
) -> Float[Array, ""]:
    """The auxiliary losses of one layer, weighted and summed; the mean over the sequences.

    T holds `num_sequences` sequences of equal length one after the other. The sequence-wise loss is equations 17 to 20
    of the V3 report (V2's expert-level loss is the same formula); the device-level and communication losses are V2's
    (report section 2.2.3). The shares of tokens carry no gradient. V3 counts a token's best experts by the unbiased
    scores (equation 18), not those that the bias chose.
    """
    weights, experts = cfg.balance, cfg.num_experts

    def picked(ids_TK: Array) -> Bool[Array, "B S E"]:
        return (ids_TK.reshape(num_sequences, -1, cfg.top_k, 1) == jnp.arange(experts)).any(2)

    probs_BSE = (scores_TE / scores_TE.sum(-1, keepdims=True)).reshape(num_sequences, -1, experts)
    mean_prob_BE = probs_BSE.mean(1)
    counted_TK = jax.lax.top_k(jax.lax.stop_gradient(scores_TE), cfg.top_k)[1] if cfg.gate == "noaux_tc" else ids_TK
    load_BE = picked(counted_TK).mean(1, dtype=jnp.float32) * (experts / cfg.top_k)
    loss_B = weights.sequence * (load_BE * mean_prob_BE).sum(-1)
    if weights.device or weights.communication:
        by_device = (num_sequences, weights.devices, -1)
        prob_BD = mean_prob_BE.reshape(by_device).sum(-1)
        loss_B += weights.device * (load_BE.reshape(by_device).mean(-1) * prob_BD).sum(-1)
        sent_BSD = picked(ids_TK).reshape(num_sequences, -1, weights.devices, experts // weights.devices).any(-1)
        sent_BD = sent_BSD.mean(1, dtype=jnp.float32) * (weights.devices / weights.device_limit)
        loss_B += weights.communication * (sent_BD * prob_BD).sum(-1)
    return loss_B.mean()
