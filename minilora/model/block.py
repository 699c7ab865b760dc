"""One transformer layer: x + attention(norm(x)), then x + mlp(norm(x)); and the same list backwards."""

from __future__ import annotations

from typing import NamedTuple

from minilora.backend import Array, xp
from minilora.model.config import Config
from minilora.model.names import LAYER
from minilora.model.sites import Gradients, LayerSites
from minilora.ops.attention import AttentionCache, QueryBlock, attention, attention_backward
from minilora.ops.rope import rope, rope_backward
from minilora.ops.swiglu import SwiGLUCache, swiglu, swiglu_backward

KeysValues = tuple[Array, Array]  # k (B, S, K, d), already turned by RoPE, and v (B, S, K, d)


class Context(NamedTuple):
    """The positions of the tokens and their visibility, which every layer's attention needs."""

    cos: Array  # (B, T, 1, d/2)
    sin: Array  # (B, T, 1, d/2)
    blocks: list[QueryBlock]  # who sees whom


class BlockCache(NamedTuple):
    sites: LayerSites  # the cache of each site, under the site's role
    attention: AttentionCache
    swiglu: SwiGLUCache


def block(
    x: Array,
    site: LayerSites,
    config: Config,
    use_rope: bool,
    context: Context,
    past: KeysValues | None,
    seed: int | None,
) -> tuple[Array, KeysValues, BlockCache]:
    """x (N, D) → x (N, D), the keys and values seen (those of the past first), and the cache. (docs: M1, M12)"""
    B, T = context.cos.shape[:2]
    d = config.head_dim

    xn, c_attention_norm = site.attention_norm.forward(x, seed)
    q, c_q = site.q.forward(xn, seed)
    k, c_k = site.k.forward(xn, seed)
    v, c_v = site.v.forward(xn, seed)
    q, k, v = q.reshape(B, T, -1, d), k.reshape(B, T, -1, d), v.reshape(B, T, -1, d)
    if use_rope:
        q, k = rope(q, context.cos, context.sin), rope(k, context.cos, context.sin)
    if past is not None:
        k, v = xp.concatenate([past[0], k], axis=1), xp.concatenate([past[1], v], axis=1)
    a, c_attention = attention(q, k, v, context.blocks)
    o, c_o = site.o.forward(a.reshape(B * T, -1), seed)
    x = x + o

    xn, c_mlp_norm = site.mlp_norm.forward(x, seed)
    gate, c_gate = site.gate.forward(xn, seed)
    up, c_up = site.up.forward(xn, seed)
    f, c_swiglu = swiglu(gate, up)
    down, c_down = site.down.forward(f, seed)
    x = x + down

    caches = LayerSites(c_attention_norm, c_q, c_k, c_v, c_o, c_mlp_norm, c_gate, c_up, c_down)
    return x, (k, v), BlockCache(caches, c_attention, c_swiglu)


def block_backward(
    dx: Array, site: LayerSites, use_rope: bool, context: Context, cache: BlockCache
) -> tuple[Array, KeysValues, Gradients]:
    """dx with respect to the layer's input (N, D), dk and dv with respect to the past's keys and values, and the
    gradients by name: "mlp.up_proj.weight". (docs: M2)

    Where forward ran x → branch → x + branch, the gradient of the sum goes unchanged into both: dx + dbranch.
    """
    B, T = context.cos.shape[:2]
    c = cache.sites
    grads: dict[str, Gradients] = {}

    df, grads["down"] = site.down.backward(dx, c.down)
    dgate, dup = swiglu_backward(df, cache.swiglu)
    dxn, grads["gate"] = site.gate.backward(dgate, c.gate)
    dxn_up, grads["up"] = site.up.backward(dup, c.up)
    dxn += dxn_up
    dbranch, grads["mlp_norm"] = site.mlp_norm.backward(dxn, c.mlp_norm)
    dx = dx + dbranch

    da, grads["o"] = site.o.backward(dx, c.o)
    dq, dk, dv = attention_backward(da.reshape(cache.attention.y.shape), cache.attention)
    dpast = dk[:, :-T], dv[:, :-T]  # the past comes first
    dk, dv = dk[:, -T:], dv[:, -T:]
    if use_rope:
        dq, dk = rope_backward(dq, context.cos, context.sin), rope_backward(dk, context.cos, context.sin)
    dxn, grads["q"] = site.q.backward(dq.reshape(B * T, -1), c.q)
    dxn_k, grads["k"] = site.k.backward(dk.reshape(B * T, -1), c.k)
    dxn_v, grads["v"] = site.v.backward(dv.reshape(B * T, -1), c.v)
    dxn += dxn_k
    dxn += dxn_v
    dbranch, grads["attention_norm"] = site.attention_norm.backward(dxn, c.attention_norm)
    dx = dx + dbranch

    return dx, dpast, {f"{LAYER[role]}.{name}": g for role in grads for name, g in grads[role].items()}
