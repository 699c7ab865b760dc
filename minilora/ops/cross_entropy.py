"""Cross-entropy of the next token, over labelled positions only."""

from __future__ import annotations

from typing import NamedTuple

from minilora.backend import Array, xp

IGNORE = -100  # the label of a position that is not trained (PyTorch's and Hugging Face's convention)


class CrossEntropyCache(NamedTuple):
    p: Array  # (N, V), softmax(logits)
    labels: Array  # (N,)


def cross_entropy(logits: Array, labels: Array, overwrite: bool = False) -> tuple[Array, CrossEntropyCache]:
    """The *sum* Σ_n −log softmax(z_n)[label_n] over the rows whose label is not IGNORE: a scalar array. (docs: O18)

    logits (N, V), labels (N,) integers. A sum, not a mean: sums over micro-batches add up to the sum over the
    batch, and the caller divides once by the number of labelled tokens. With `overwrite`, p takes the place of logits.
    """
    # p = exp(z) / exp(z).sum() row by row, and loss = Σ -log p[label] = Σ (log exp(z).sum() - z[label]), for any shift
    # of a row of z; with the largest entry at 0, exp cannot overflow
    largest = logits.real.max(axis=-1, keepdims=True)
    z = xp.subtract(logits, largest, out=logits if overwrite else None)
    labelled = labels != IGNORE
    picked = xp.take_along_axis(z, xp.where(labelled, labels, 0)[:, None], axis=-1)[:, 0]
    p = xp.exp(z, out=z)
    total = p.sum(axis=-1, keepdims=True)
    loss = ((xp.log(total[:, 0]) - picked) * labelled).sum()
    p /= total
    return loss, CrossEntropyCache(p, labels)


def cross_entropy_backward(dloss: Array | float, cache: CrossEntropyCache, overwrite: bool = False) -> Array:
    """dlogits (N, V). With `overwrite` it takes the place of the cache's p. (docs: O19)

    Forward was Σ_n [log Σ_v e^{z_nv} − z_n,label], so dz_n = dloss · (softmax(z_n) − onehot(label_n)), and 0 in rows
    without a label.
    """
    p, labels = cache
    labelled = labels != IGNORE
    # dlogits = dloss * (p - onehot(labels)) in labelled rows, 0 in all others
    weight = labelled.astype(p.dtype)
    weight *= dloss
    dlogits: Array = xp.multiply(p, weight[:, None], out=p if overwrite else None)
    dlogits[xp.arange(len(labels)), xp.where(labelled, labels, 0)] -= weight
    return dlogits
