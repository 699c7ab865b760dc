"""A template: an implementation of LoRA as the laws ask for it. Copy it, and fill in what you have.

    pytest tests/specification --implementation my_lora.py

Leave out what you do not have, or let it raise NotImplementedError: its laws are then listed as not offered. Everything
that goes in and comes out is a NumPy array or a plain number; a framework's tensors are made and unmade in here. No
function may change what it is given. `scale` is the factor s itself, not α. dy is the gradient of the loss L with
respect to the output, and every gradient is one of L = Σ y ⊙ dy, summed over rows, with the shape of its variable.

N rows (tokens), r rank, T positions of one sequence, H query heads, K key/value heads (K divides H), d head width,
V words.
"""

DTYPE = "float64"  # or "float32": the arrays have this dtype, and the tolerances follow
COMPLEX = False  # True if the functions take complex128, too: gradients are then checked by the complex step


# --- A LoRA linear map: W (out, in), A (r, in), B (out, r) ---


def lora_forward(x, W, A, B, scale):
    """y = x Wᵀ + scale (x Aᵀ) Bᵀ for x (N, in): y (N, out)."""
    raise NotImplementedError


def lora_gradients(x, W, A, B, scale, dy):
    """dx (N, in), dA (r, in), dB (out, r) for dy (N, out)."""
    raise NotImplementedError


def lora_merge(W, A, B, scale):
    """W + scale B A: (out, in)."""
    raise NotImplementedError


def lora_unmerge(merged, A, B, scale):
    """W again, up to rounding: (out, in)."""
    raise NotImplementedError


def lora_start(rank, in_features, out_features, seed):
    """A (r, in), B (out, r) before the first step; the same for the same seed."""
    raise NotImplementedError


def lora_scale(alpha, rank, rslora):
    """The factor s of an adapter with these settings; rslora is True or False: a number."""
    raise NotImplementedError


def lora_step(x, target, W, A, B, scale, learning_rate):
    """A, B after one step of gradient descent on ½ Σ (y − target)², target (N, out)."""
    raise NotImplementedError


# --- Dropout on the input of A: p is the share of inputs set to zero, the seed chooses which ---


def dropout_forward(x, W, A, B, scale, p, seed):
    """y (N, out) in training."""
    raise NotImplementedError


def dropout_gradients(x, W, A, B, scale, p, seed, dy):
    """dx, dA, dB of the very forward that this seed gives."""
    raise NotImplementedError


# --- DoRA (Liu et al., 2024, arXiv:2402.09353): V = W + scale B A, y_o = m_o (x V_oᵀ) / ‖V_o‖ for each row V_o ---


def dora_start(W):
    """m (out,) before the first step."""
    raise NotImplementedError


def dora_forward(x, W, A, B, m, scale):
    """y (N, out)."""
    raise NotImplementedError


def dora_bias_forward(x, W, b, A, B, m, scale):
    """y (N, out) of a map that has a frozen bias b (out,), too."""
    raise NotImplementedError


def dora_dropout_forward(x, W, A, B, m, scale, p, seed):
    """y (N, out) in training, with dropout on the input of A."""
    raise NotImplementedError


def dora_gradients(x, W, A, B, m, scale, dy):
    """dx, dA, dB, dm, with ‖V‖ held constant as the paper has it (section 4.3)."""
    raise NotImplementedError


def dora_merge(W, A, B, m, scale):
    """The plain weight (out, in) that computes the same."""
    raise NotImplementedError


# --- NF4 (Dettmers et al., 2023, arXiv:2305.14314), absmax unquantised; the blocks run along the rows of W ---


def nf4_quantize(W, block_size):
    """codes (W.size,) from 0 to 15, 7 being zero, one a number, not packed; absmax (W.size / block_size,)."""
    raise NotImplementedError


def nf4_dequantize(codes, absmax, block_size, shape):
    """W as the codes have it."""
    raise NotImplementedError


# --- LoRA on an embedding: E (V, D), A (r, V), B (D, r), tokens (N,) ---


def embedding_forward(tokens, E, A, B, scale):
    """y_n = E[t_n] + scale B A[:, t_n]: (N, D)."""
    raise NotImplementedError


def embedding_gradients(tokens, E, A, B, scale, dy):
    """dA, dB for dy (N, D)."""
    raise NotImplementedError


# --- The operations of a Llama ---


def rmsnorm_forward(x, gain, eps):
    """gain ⊙ x / √(mean(x²) + eps) for each row of x (N, D), gain (D,)."""
    raise NotImplementedError


def rmsnorm_gradients(x, gain, eps, dy):
    """dx, dgain."""
    raise NotImplementedError


def rope_forward(x, positions, theta):
    """x (T, H, d) turned: features j and j + d/2 of each head by the angle position · theta^(−2j/d)."""
    raise NotImplementedError


def rope_gradients(positions, theta, dy):
    """dx."""
    raise NotImplementedError


def attention_forward(q, k, v):
    """Causal attention of one sequence, q (T, H, d), k and v (T, K, d): (T, H, d).

    Scores are divided by √d; query head h reads key head h // (H/K).
    """
    raise NotImplementedError


def attention_gradients(q, k, v, dy):
    """dq, dk, dv."""
    raise NotImplementedError


def swiglu_forward(gate, up):
    """silu(gate) ⊙ up."""
    raise NotImplementedError


def swiglu_gradients(gate, up, dy):
    """dgate, dup."""
    raise NotImplementedError


# --- Training ---


def cross_entropy_forward(logits, labels):
    """The mean of −log softmax(logits)[label], a number: logits (N, V), labels (N,), −100 where there is none."""
    raise NotImplementedError


def cross_entropy_gradients(logits, labels):
    """dlogits (N, V) of that mean."""
    raise NotImplementedError


def adamw_walk(p, gradients, learning_rate, beta1, beta2, eps, weight_decay):
    """p after each step, (steps, *p.shape), for gradients (steps, *p.shape); the moments begin at zero."""
    raise NotImplementedError


def accumulated_gradients(micro_batches, W, A, B, scale):
    """loss, dA, dB of one step over a list of (x (n, in), labels (n,)), the outputs y of the LoRA map being the logits.

    The loss is the mean over all labelled rows of the step; −100 marks a row without a label.
    """
    raise NotImplementedError


# --- An adapter's folder, as PEFT lays it out: adapter_config.json and adapter_model.safetensors ---


def adapter_write(folder, tensors, rank, alpha, rslora):
    """Write the adapter: tensors is a dict from modules, as model.layers.0.self_attn.q_proj, to (A, B)."""
    raise NotImplementedError


def adapter_read(folder):
    """(tensors as above, scale) from a folder that PEFT, or the laws, wrote."""
    raise NotImplementedError
