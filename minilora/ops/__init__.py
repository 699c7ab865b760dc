"""The operations of a Llama-style transformer, each a forward and a backward written side by side.

    y, cache = operation(x, ...)
    dx, ...  = operation_backward(dy, cache)

`dname` is the gradient of the loss with respect to `name` and has its shape. A cache holds exactly what the
backward needs. Nothing here takes an absolute value or a norm, so every operation also runs on complex numbers and
its gradient can be checked to machine precision by the complex step.

Shapes: B batch, T time, N = B·T tokens, D model width, H heads, K key/value heads, G = H/K queries per key,
d head width, F feed-forward width, V vocabulary, r rank.
"""
