"""One transformer layer: x = x + attention(norm(x)), then x = x + mlp(norm(x)); and the same list backwards."""

from __future__ import annotations

from typing import Any, NamedTuple

from minilora.backend import Array, xp
from minilora.model.names import LAYER
from minilora.model.sites import Gradients, LayerSites, Site
from minilora.ops.attention import AttentionCache, QueryBlock, attention, attention_backward
from minilora.ops.rope import rope, rope_backward
from minilora.ops.swiglu import SwiGLUCache, swiglu, swiglu_backward

KeysValues = tuple[Array, Array]  # k (B, S, K, d), already turned by RoPE, and v (B, S, K, d)


class Context(NamedTuple):
    """What every layer's attention needs to know about where the tokens stand."""

    cos: Array  # (B, T, 1, d/2)
    sin: Array  # (B, T, 1, d/2)
    blocks: list[QueryBlock]  # which query sees which key


class HeadsCache(NamedTuple):
    linear: Any
    norm: Any


class AttentionBranchCache(NamedTuple):
    q: HeadsCache
    k: HeadsCache
    v: HeadsCache
    attention: AttentionCache
    o: Any


class MLPBranchCache(NamedTuple):
    gate: Any
    up: Any
    swiglu: SwiGLUCache
    down: Any


class BlockCache(NamedTuple):
    attention_norm: Any
    attention: AttentionBranchCache
    mlp_norm: Any
    mlp: MLPBranchCache


def block(
    x: Array, site: LayerSites, context: Context, use_rope: bool, past: KeysValues | None, seed: int | None
) -> tuple[Array, KeysValues, BlockCache]:
    """x (N, D) → x (N, D), the keys and values seen (those of the past first), and the cache. (docs: M1, M12)"""
    xn, c_attention_norm = site.attention_norm.forward(x, seed)
    o, keys_values, c_attention = attention_branch(xn, site, context, use_rope, past, seed)
    x = x + o

    xn, c_mlp_norm = site.mlp_norm.forward(x, seed)
    down, c_mlp = mlp_branch(xn, site, seed)
    x = x + down

    return x, keys_values, BlockCache(c_attention_norm, c_attention, c_mlp_norm, c_mlp)


def block_backward(
    dx: Array, site: LayerSites, context: Context, use_rope: bool, cache: BlockCache
) -> tuple[Array, KeysValues, Gradients]:
    """dx with respect to the layer's input (N, D), dk and dv with respect to the past's keys and values, and the
    gradients by name: "mlp.up_proj.weight". (docs: M2)

    Forward was x → branch → x + branch, so the gradient of the sum goes unchanged into both: dx + dbranch.
    """
    dxn, mlp_grads = mlp_branch_backward(dx, site, cache.mlp)
    dbranch, mlp_norm_grads = site.mlp_norm.backward(dxn, cache.mlp_norm)
    dx = dx + dbranch

    dxn, dpast, attention_grads = attention_branch_backward(dx, site, context, use_rope, cache.attention)
    dbranch, attention_norm_grads = site.attention_norm.backward(dxn, cache.attention_norm)
    dx = dx + dbranch

    grads = mlp_grads | {"mlp_norm": mlp_norm_grads} | attention_grads | {"attention_norm": attention_norm_grads}
    return dx, dpast, {f"{LAYER[role]}.{name}": g for role in grads for name, g in grads[role].items()}


def attention_branch(
    xn: Array, site: LayerSites, context: Context, use_rope: bool, past: KeysValues | None, seed: int | None
) -> tuple[Array, KeysValues, AttentionBranchCache]:
    """xn (N, D) → o (N, D), the keys and values seen (those of the past first), and the cache. (docs: M1, M12)"""
    q, c_q = heads(xn, site.q, site.q_norm, context, seed)
    k, c_k = heads(xn, site.k, site.k_norm, context, seed)
    v, c_v = heads(xn, site.v, None, context, seed)
    if use_rope:
        q, k = rope(q, context.cos, context.sin), rope(k, context.cos, context.sin)
    if past is not None:
        k, v = xp.concatenate([past[0], k], axis=1), xp.concatenate([past[1], v], axis=1)
    a, c_attention = attention(q, k, v, context.blocks)
    o, c_o = site.o.forward(_join_heads(a), seed)
    return o, (k, v), AttentionBranchCache(c_q, c_k, c_v, c_attention, c_o)


def attention_branch_backward(
    do: Array, site: LayerSites, context: Context, use_rope: bool, cache: AttentionBranchCache
) -> tuple[Array, KeysValues, dict[str, Gradients]]:
    """dxn (N, D), dk and dv of the past (B, S − T, K, d), and the gradients by role. (docs: M2)

    Forward used xn three times, so dxn is the sum of the three gradients.
    """
    da, o_grads = site.o.backward(do, cache.o)
    dq, dk, dv = attention_backward(_split_heads(da, context), cache.attention)
    T = dq.shape[1]
    dpast = dk[:, :-T], dv[:, :-T]  # the past comes first
    dk, dv = dk[:, -T:], dv[:, -T:]
    if use_rope:
        dq, dk = rope_backward(dq, context.cos, context.sin), rope_backward(dk, context.cos, context.sin)
    dxn, q_grads, q_norm_grads = heads_backward(dq, site.q, site.q_norm, cache.q)
    dxn_k, k_grads, k_norm_grads = heads_backward(dk, site.k, site.k_norm, cache.k)
    dxn_v, v_grads, _ = heads_backward(dv, site.v, None, cache.v)
    dxn += dxn_k
    dxn += dxn_v
    grads = {"o": o_grads, "q": q_grads, "k": k_grads, "v": v_grads, "q_norm": q_norm_grads, "k_norm": k_norm_grads}
    return dxn, dpast, grads


def heads(xn: Array, linear: Site, norm: Site | None, context: Context, seed: int | None) -> tuple[Array, HeadsCache]:
    """xn (N, D) → q, k or v (B, T, heads, d), in Qwen3 with each head's q and k normalised, and the cache. (docs: M1)

    The norm sees each head of each token as a row of its own.
    """
    y, c_linear = linear.forward(xn, seed)
    y, c_norm = _split_heads(y, context), None
    if norm is not None:
        rows, c_norm = norm.forward(y.reshape(-1, y.shape[-1]), seed)
        y = rows.reshape(y.shape)
    return y, HeadsCache(c_linear, c_norm)


def heads_backward(dy: Array, linear: Site, norm: Site | None, cache: HeadsCache) -> tuple[Array, Gradients, Gradients]:
    """dxn (N, D), and the gradients of the linear map and of the norm. (docs: M2)"""
    norm_grads: Gradients = {}
    if norm is not None:
        drows, norm_grads = norm.backward(dy.reshape(-1, dy.shape[-1]), cache.norm)
        dy = drows.reshape(dy.shape)
    dxn, linear_grads = linear.backward(_join_heads(dy), cache.linear)
    return dxn, linear_grads, norm_grads


def mlp_branch(xn: Array, site: LayerSites, seed: int | None) -> tuple[Array, MLPBranchCache]:
    """xn (N, D) → down (N, D), and the cache. (docs: M1)"""
    gate, c_gate = site.gate.forward(xn, seed)
    up, c_up = site.up.forward(xn, seed)
    f, c_swiglu = swiglu(gate, up)
    down, c_down = site.down.forward(f, seed)
    return down, MLPBranchCache(c_gate, c_up, c_swiglu, c_down)


def mlp_branch_backward(ddown: Array, site: LayerSites, cache: MLPBranchCache) -> tuple[Array, dict[str, Gradients]]:
    """dxn (N, D), and the gradients by role. (docs: M2)"""
    df, down_grads = site.down.backward(ddown, cache.down)
    dgate, dup = swiglu_backward(df, cache.swiglu)
    dxn, gate_grads = site.gate.backward(dgate, cache.gate)
    dxn_up, up_grads = site.up.backward(dup, cache.up)
    dxn += dxn_up
    return dxn, {"down": down_grads, "gate": gate_grads, "up": up_grads}


def _split_heads(x: Array, context: Context) -> Array:
    """(N, heads · d) → (B, T, heads, d)."""
    B, T, _, half = context.cos.shape
    return x.reshape(B, T, -1, 2 * half)


def _join_heads(x: Array) -> Array:
    """(B, T, heads, d) → (N, heads · d)."""
    return x.reshape(x.shape[0] * x.shape[1], -1)
