"""AdamW with its state in 8 bits: two bytes for each number that trains, and not eight."""

from __future__ import annotations

from minilora.backend import Array, to_device, xp
from minilora.frozen.nf4 import DYNAMIC, DYNAMIC_UNSIGNED, dequantize, quantize
from minilora.model.names import EMBED
from minilora.training.optimizers.adamw import AdamW
from minilora.training.optimizers.optimizer import Arrays, RateFactors

STATE_BLOCK = 256  # numbers that share a scale


class EightBits:
    """An array, at first of zeros, held as codes of `table`'s 256 values and the largest magnitude of each block."""

    def __init__(self, like: Array, table: Array) -> None:
        self.shape, self.dtype, self.table = like.shape, like.dtype, table
        self.codes = xp.zeros(like.size, "uint8")
        self.absmax = xp.zeros(-(-like.size // STATE_BLOCK), "float32")  # 0: every code of the block stands for 0

    def read(self) -> Array:
        """The numbers that the codes stand for, in the dtype of the parameter. (docs: T12)"""
        numbers = dequantize(self.codes, self.absmax, self.table, STATE_BLOCK)
        return numbers.reshape(self.shape).astype(self.dtype, copy=False)

    def write(self, numbers: Array) -> None:
        """Keep the nearest of the table's values, in the arrays that `state` has handed out. (docs: T12)"""
        self.codes[...], self.absmax[...] = quantize(numbers, self.table, STATE_BLOCK)


class AdamW8bit:
    """AdamW whose m and v are quantised between steps (Dettmers et al., 2021, arXiv:2110.02861). (docs: T12)

        m, v ← dequantised, one parameter at a time
        p, m, v ← a step of AdamW in full precision
        m, v → quantised in blocks of 256: m with a sign, v without, which leaves twice as many values for it

    As in bitsandbytes and transformers, arrays of fewer than 4096 numbers and embeddings stay as in `AdamW`. They are
    little, or their gradient is zero in most rows, and a v that has been rounded to 0 beside an m that has not would
    make a huge step there.
    """

    elementwise = False

    def __init__(
        self,
        parameters: Arrays,
        weight_decay: float = 0.0,
        factors: RateFactors | None = None,
        min_8bit_size: int = 4096,
    ) -> None:
        signed, unsigned = to_device(DYNAMIC), to_device(DYNAMIC_UNSIGNED)
        in_8bit = {name: p for name, p in parameters.items() if p.size >= min_8bit_size and EMBED not in name}
        self.m = {name: EightBits(p, signed) for name, p in in_8bit.items()}
        self.v = {name: EightBits(p, unsigned) for name, p in in_8bit.items()}
        self.adamw = AdamW(self.others(parameters), weight_decay, factors)
        self.factors = dict.fromkeys(parameters, 1.0) | dict(factors or {})

    def others(self, parameters: Arrays) -> Arrays:
        """Those whose state is not in 8 bits."""
        return {name: p for name, p in parameters.items() if name not in self.m}

    def update(self, parameters: Arrays, gradients: Arrays, learning_rate: float) -> None:
        self.adamw.update(self.others(parameters), gradients, learning_rate)
        t = int(self.adamw.steps)
        for name in self.m:
            m, v = self.m[name].read(), self.v[name].read()
            self.adamw.move(parameters[name], gradients[name], m, v, learning_rate * self.factors[name], t)
            self.m[name].write(m)
            self.v[name].write(v)

    def state(self) -> dict[str, Array]:
        """Codes and scales of m and v, those of `AdamW` for the others, and t. (docs: T10)"""
        kept = {"m": self.m, "v": self.v}
        codes = {f"{kind}.{name}.codes": x.codes for kind, held in kept.items() for name, x in held.items()}
        absmax = {f"{kind}.{name}.absmax": x.absmax for kind, held in kept.items() for name, x in held.items()}
        return {**self.adamw.state(), **codes, **absmax}
