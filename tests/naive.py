"""Slow references in NumPy and float64, written from the DeepSeek-V3 and V2 reports, never from the code under test.

One token, one expert, one position at a time wherever that keeps the formula in sight. Weights have the names and the
layout [out, in] of Hugging Face checkpoints; `hf` is a dict with the keys of their `config.json`.

S sequences, T tokens, E experts, K experts per token, G groups of experts, H heads.
"""

import math

import ml_dtypes
import numpy as np


def rms_norm(x, scale, eps=1e-6):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def softmax(x):
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(x, gate, up, down):
    """W_down(silu(W_gate x) * (W_up x)) for x [..., in]."""
    g = x @ gate.T
    return (g * sigmoid(g) * (x @ up.T)) @ down.T


# --------------------------------------------------------------------------------------------------------- attention


def yarn_mscale(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(dim, theta, yarn=None):
    """Radians per position of each of the dim/2 pairs; `yarn` is the dict `rope_scaling`."""
    f = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    if yarn is None:
        return np.array(f)

    def dim_of(rotations):
        length = yarn["original_max_position_embeddings"]
        return dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(dim_of(yarn["beta_fast"])), 0)
    high = min(math.ceil(dim_of(yarn["beta_slow"])), dim - 1)
    if low == high:
        high += 0.001
    out = []
    for j, value in enumerate(f):
        ramp = min(max((j - low) / (high - low), 0.0), 1.0)
        out.append(value * (1 - ramp) + value / yarn["factor"] * ramp)
    return np.array(out)


def rotate(x, position, freqs):
    """One vector [dim]: the pair (2j, 2j+1) turned by position * freqs[j], as in the released weights."""
    out = np.empty(len(x))
    for j, freq in enumerate(freqs):
        c, s = math.cos(position * freq), math.sin(position * freq)
        out[2 * j] = x[2 * j] * c - x[2 * j + 1] * s
        out[2 * j + 1] = x[2 * j] * s + x[2 * j + 1] * c
    return out


def rotary_magnitude(yarn):
    """What cos and sin are multiplied by; 1 where mscale is mscale_all_dim, as in every published model."""
    if yarn is None:
        return 1.0
    return yarn_mscale(yarn["factor"], yarn["mscale"]) / yarn_mscale(yarn["factor"], yarn["mscale_all_dim"])


def softmax_scale(qk_dim, yarn=None):
    m = 1.0 if yarn is None else yarn_mscale(yarn["factor"], yarn["mscale_all_dim"])
    return qk_dim**-0.5 * m * m


def attention(q, k, v, scale, segments=None):
    """Causal softmax attention of one sequence; q and k [T, H, qk], v [T, H, v]; within segments if given."""
    T, H, _ = q.shape
    out = np.zeros((T, H, v.shape[-1]))
    for t in range(T):
        seen = [u for u in range(t + 1) if segments is None or segments[u] == segments[t]]
        for h in range(H):
            p = softmax(np.array([q[t, h] @ k[u, h] for u in seen]) * scale)
            out[t, h] = sum(p_u * v[u, h] for p_u, u in zip(p, seen, strict=True))
    return out


def mla(w, hf, x, positions=None, segments=None):
    """Multi-head latent attention of one sequence x [T, d]; `w` has the names below `self_attn.`"""
    T, H = len(x), hf["num_attention_heads"]
    dn, dr, dv, dc = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"], hf["kv_lora_rank"]
    positions = range(T) if positions is None else positions
    yarn = hf.get("rope_scaling")
    freqs = frequencies(dr, hf["rope_theta"], yarn)
    magnitude = rotary_magnitude(yarn)
    if hf.get("q_lora_rank"):
        compressed = rms_norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], hf["rms_norm_eps"])
        q = (compressed @ w["q_b_proj.weight"].T).reshape(T, H, dn + dr)
    else:
        q = (x @ w["q_proj.weight"].T).reshape(T, H, dn + dr)
    a = x @ w["kv_a_proj_with_mqa.weight"].T
    latent = rms_norm(a[:, :dc], w["kv_a_layernorm.weight"], hf["rms_norm_eps"])
    kv = (latent @ w["kv_b_proj.weight"].T).reshape(T, H, dn + dv)
    queries, keys = np.zeros((T, H, dn + dr)), np.zeros((T, H, dn + dr))
    for t, position in enumerate(positions):
        k_rope = magnitude * rotate(a[t, dc:], position, freqs)
        for h in range(H):
            queries[t, h] = np.concatenate([q[t, h, :dn], magnitude * rotate(q[t, h, dn:], position, freqs)])
            keys[t, h] = np.concatenate([kv[t, h, :dn], k_rope])
    out = attention(queries, keys, kv[:, :, dn:], softmax_scale(dn + dr, yarn), segments)
    return out.reshape(T, H * dv) @ w["o_proj.weight"].T


# ------------------------------------------------------------------------------------------------------------ experts


def _top(values, count):
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def gate_v3(logits, bias, groups, top_groups, top_k, normalize=True, route_scale=2.5):
    """The gate of one token: (ids, weights), best biased score first, and the scores of all experts."""
    s = sigmoid(logits)
    z = s + bias
    size, best = len(s) // groups, max(1, top_k // top_groups)
    group_scores = [sum(sorted(z[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
    kept = _top(group_scores, top_groups)
    masked = [z[e] if e // size in kept else -math.inf for e in range(len(s))]
    ids = _top(masked, top_k)
    weights = s[ids]
    if normalize:
        weights = weights / weights.sum()
    return np.array(ids), weights * route_scale, s


def gate_v2(logits, groups, top_groups, top_k, normalize=False, route_scale=1.0):
    """V2's gates of one token: group_limited_greedy, and with one group greedy."""
    s = softmax(logits)
    size = len(s) // groups
    kept = _top([max(s[g * size : (g + 1) * size]) for g in range(groups)], top_groups)
    ids = _top([s[e] if e // size in kept else -math.inf for e in range(len(s))], top_k)
    weights = s[ids]
    if normalize:
        weights = weights / weights.sum()
    return np.array(ids), weights * route_scale, s


def gate(logits, bias, hf):
    groups, top_groups = hf.get("n_group") or 1, hf.get("topk_group") or 1
    settings = (groups, top_groups, hf["num_experts_per_tok"], hf["norm_topk_prob"], hf["routed_scaling_factor"])
    if hf["topk_method"] == "noaux_tc":
        return gate_v3(logits, bias, *settings)
    return gate_v2(logits, *settings)


def experts(x, ids, weights, gate_w, up_w, down_w):
    """Sum over a token's experts, one token and one expert at a time; x [T, d], the weights [E, out, in]."""
    y = np.zeros_like(x)
    for t in range(len(x)):
        for e, weight in zip(ids[t], weights[t], strict=True):
            y[t] += weight * swiglu(x[t], gate_w[e], up_w[e], down_w[e])
    return y


def moe(w, hf, x):
    """Routed and shared experts for x [T, d]; `w` has the names below `mlp.`. Returns y, ids [T, K], scores [T, E]."""
    E = hf["n_routed_experts"]
    bias = w.get("gate.e_score_correction_bias", np.zeros(E))
    picked = [gate(row, bias, hf) for row in x @ w["gate.weight"].T]
    ids, weights, scores = (np.array([p[i] for p in picked]) for i in range(3))
    parts = [[w[f"experts.{e}.{part}_proj.weight"] for e in range(E)] for part in ("gate", "up", "down")]
    y = experts(x, ids, weights, *parts)
    if hf.get("n_shared_experts"):
        y = y + swiglu(x, *(w[f"shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")))
    return y, ids, scores


def update_bias(bias, counts, speed):
    """After a step: an overloaded expert's bias falls by `speed`, an underloaded one's rises."""
    mean = sum(counts) / len(counts)
    return np.array(
        [b + speed if c < mean else b - speed if c > mean else b for b, c in zip(bias, counts, strict=True)]
    )


# ------------------------------------------------------------------------------------------------------------- losses


def top_ids(scores, top_k):
    """The K best experts of each token by the given scores, [..., T, K]."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :top_k]


def _fractions(scores, ids):
    """f_i and P_i of one sequence; scores [T, E], ids [T, K] of the experts that count as chosen."""
    T, E = scores.shape
    K = ids.shape[1]
    f, p = np.zeros(E), np.zeros(E)
    for t in range(T):
        for e in ids[t]:
            f[e] += E / (K * T)
        p += scores[t] / scores[t].sum() / T
    return f, p


def sequence_balance_loss(scores, ids, alpha):
    """alpha * sum_i f_i P_i, mean over sequences; scores [S, T, E], ids [S, T, K]."""
    values = []
    for s, i in zip(scores, ids, strict=True):
        f, p = _fractions(s, i)
        values.append(alpha * np.sum(f * p))
    return np.mean(values)


def device_balance_loss(scores, ids, alpha, devices):
    """V2: experts in contiguous groups, one per device; f' is the group's mean, P' its sum."""
    values = []
    for s, i in zip(scores, ids, strict=True):
        f, p = _fractions(s, i)
        values.append(
            alpha * sum(a.mean() * b.sum() for a, b in zip(np.split(f, devices), np.split(p, devices), strict=True))
        )
    return np.mean(values)


def communication_balance_loss(scores, ids, alpha, devices, device_limit):
    """V2: f'' counts the tokens that are sent to a device, once however many of its experts they use."""
    values = []
    for s, i in zip(scores, ids, strict=True):
        T, E = s.shape
        _, p = _fractions(s, i)
        sent = np.zeros(devices)
        for t in range(T):
            for device in {int(e) * devices // E for e in i[t]}:
                sent[device] += devices / (device_limit * T)
        values.append(alpha * sum(a * b.sum() for a, b in zip(sent, np.split(p, devices), strict=True)))
    return np.mean(values)


def nll(logits, target):
    """-log softmax(logits)[target] of one position."""
    top = np.max(logits)
    return math.log(np.sum(np.exp(logits - top))) + top - logits[target]


# ---------------------------------------------------------------------------------------------------------- the model


def below(w, prefix):
    """The entries of `w` whose name starts with the prefix, without it."""
    return {name[len(prefix) :]: value for name, value in w.items() if name.startswith(prefix)}


def block(w, hf, x, dense, segments=None):
    """One pre-norm layer on x [T, d]. Returns x and, for a MoE layer, (ids, scores), else None."""
    eps = hf["rms_norm_eps"]
    x = x + mla(below(w, "self_attn."), hf, rms_norm(x, w["input_layernorm.weight"], eps), segments=segments)
    u = rms_norm(x, w["post_attention_layernorm.weight"], eps)
    if dense:
        return x + swiglu(u, *(w[f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))), None
    y, ids, scores = moe(below(w, "mlp."), hf, u)
    return x + y, (ids, scores)


def backbone(w, hf, tokens, segments=None):
    """The last layer's output [T, d] before the final norm, and the routing of every MoE layer."""
    x, routing = w["model.embed_tokens.weight"][tokens], []
    for layer in range(hf["num_hidden_layers"]):
        dense = layer < hf["first_k_dense_replace"]
        x, routed = block(below(w, f"model.layers.{layer}."), hf, x, dense, segments)
        routing += [routed] if routed else []
    return x, routing


def model(w, hf, tokens, segments=None):
    """Logits [T, vocab] of one sequence of T tokens."""
    x, _ = backbone(w, hf, tokens, segments)
    return rms_norm(x, w["model.norm.weight"], hf["rms_norm_eps"]) @ w["lm_head.weight"].T


def mtp_losses(w, hf, tokens, depth, after_final_norm=True):
    """[L_1 ... L_D] of one sequence of T + 1 tokens (equations 21 to 25), each a sum divided by T; and their routing.

    Position i of module k sees h_i of the module before and the token i + k, and predicts the token i + k + 1.
    """
    T, eps = len(tokens) - 1, hf["rms_norm_eps"]
    h, _ = backbone(w, hf, tokens[:T])
    if after_final_norm:
        h = rms_norm(h, w["model.norm.weight"], eps)
    losses, routing = [], []
    for k in range(1, depth + 1):
        m = below(w, f"model.layers.{hf['num_hidden_layers'] + k - 1}.")
        pairs = []
        for i in range(T - k):
            embedding = rms_norm(w["model.embed_tokens.weight"][tokens[i + k]], m["enorm.weight"], eps)
            pairs.append(np.concatenate([embedding, rms_norm(h[i], m["hnorm.weight"], eps)]))
        h, routed = block(m, hf, np.array(pairs) @ m["eh_proj.weight"].T, dense=False)
        routing.append(routed)
        logits = rms_norm(h, m["shared_head.norm.weight"], eps) @ w["lm_head.weight"].T
        losses.append(sum(nll(logits[i], tokens[i + k + 1]) for i in range(T - k)) / T)
    return losses, routing


# ----------------------------------------------------------------------------------------------------------- training


def v3_learning_rate(tokens, step=10**9):
    """DeepSeek-V3's learning rate of the step `step` (from 1; 2000 of warm-up) that starts after `tokens` tokens."""
    if step < 2000:
        return 2.2e-4 * step / 2000
    if tokens < 10e12:
        return 2.2e-4
    if tokens < 14.3e12:
        return 2.2e-5 + 0.5 * (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * (tokens - 10e12) / 4.3e12))
    return 2.2e-5 if tokens < 14.633e12 else 7.3e-6


def v3_bias_update_speed(tokens):
    return 0.001 if tokens < 14.3e12 else 0.0


def v3_mtp_weight(tokens):
    return 0.3 if tokens < 10e12 else 0.1


def adamw_step(params, grads, lr, step=1, m=None, v=None, decay=0.1, clip=1.0, beta1=0.9, beta2=0.95, eps=1e-8):
    """One AdamW step on dicts of arrays after clipping by the global norm; matrices decay, vectors do not.

    `step` counts from 1. Returns the new parameters, the moments m and v, and the norm before clipping.
    """
    norm = math.sqrt(sum(float(np.sum(g**2)) for g in grads.values()))
    shrink = min(1.0, clip / norm)
    new, new_m, new_v = {}, {}, {}
    for name, p in params.items():
        g = grads[name] * shrink
        new_m[name] = beta1 * (m[name] if m else 0.0) + (1 - beta1) * g
        new_v[name] = beta2 * (v[name] if v else 0.0) + (1 - beta2) * g**2
        direction = (new_m[name] / (1 - beta1**step)) / (np.sqrt(new_v[name] / (1 - beta2**step)) + eps)
        new[name] = p - lr * (direction + (decay * p if p.ndim > 1 else 0.0))
    return new, new_m, new_v, norm


# ------------------------------------------------------------------------------------------------- FP8 (section 3.3)


def quantise(x, tile, power_of_two=False):
    """E4M3 numbers and the scale of each, in tiles of `tile` rows and columns counted from the first."""
    x = np.asarray(x, np.float32)
    scales = np.zeros(x.shape, np.float32)
    for i in range(0, x.shape[0], tile[0]):
        for j in range(0, x.shape[1], tile[1]):
            part = np.s_[i : i + tile[0], j : j + tile[1]]
            scale = np.float32(max(np.abs(x[part]).max(), np.float32(1e-4))) * np.float32(1 / 448)
            scales[part] = 2.0 ** np.ceil(np.log2(float(scale))) if power_of_two else scale
    values = np.clip(x * (np.float32(1) / scales), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return values, scales


def scaled_product(a, b):
    """a [R, K] times b [N, K], each E4M3 numbers and their scales: every 128 products are summed, scaled and added."""
    (a, a_scales), (b, b_scales) = a, b
    total = np.zeros((len(a), len(b)))
    for k in range(0, a.shape[1], 128):
        products = a[:, k : k + 128].astype(float) @ b[:, k : k + 128].astype(float).T
        total += products * np.outer(a_scales[:, k], np.ones(len(b))) * b_scales[:, k]
    return total


def fp8_linear(x, w, dy, power_of_two=False):
    """y = x w and the gradients of x and w, whose three products are of E4M3 numbers; x [T, I], w [I, O], dy [T, O]."""
    x8, w8, dy8 = quantise(x, (1, 128), power_of_two), quantise(w, (128, 128)), quantise(dy, (1, 128))
    x_again = quantise(x8[0].astype(np.float32) * x8[1], (128, 1), power_of_two)
    y = scaled_product(x8, turned(w8))
    return y, scaled_product(dy8, w8), scaled_product(turned(x_again), turned(quantise(dy, (128, 1))))


def turned(scaled):
    """The transpose of E4M3 numbers and their scales."""
    return scaled[0].T, scaled[1].T
