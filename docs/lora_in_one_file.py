"""LoRA in one file: a language model of the Llama kind, its gradients by hand, and a low-rank adapter that trains.

    python docs/lora_in_one_file.py [MODEL_FOLDER] [NEW_ADAPTER_FOLDER]

A pretrained linear map y = x Wᵀ is to learn something new. Full fine-tuning changes every number of W. LoRA (Hu et al.,
2021, arXiv:2106.09685) freezes W and trains a change of low rank beside it, which has far fewer numbers:

    y = x Wᵀ + s (x Aᵀ) Bᵀ        W (out, in) is frozen, A (r, in) starts random, B (out, r) starts at 0, s = α/r

This file loads a small model that has never seen SQL, trains A and B on a few rows, asks a question that is in none of
them, adds s B A to W, and writes the adapter as PEFT does. NumPy does all the arithmetic.

Letters: T time (tokens of a text), D model width, H query heads, K key/value heads, G = H/K, d head width, L layers,
F feed-forward width, V vocabulary, r rank. One text runs at a time, so there is no batch axis. Vectors are rows, one
for each token. `dx` is the gradient of the loss with respect to x. A forward returns its result and a cache, which is
what its backward needs. The steps of a forward are numbered 1 2 3, and its backward undoes them 3 2 1.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file
from tokenizers import Tokenizer

# fmt: off
MODEL = Path(__file__).resolve().parents[1] / "weights" / "tinysmol"
SITES = ("q_proj", "v_proj")          # the maps that `forward` and `backward` send through LoRA: change all three
RANK, ALPHA = 8, 16                   # r and α
STEPS, RATE, DECAY = 25, 1e-2, 0.01   # a learning rate this high suits a tiny model and few steps
ROWS = [
    ("How many boats are there?", " SELECT COUNT(*) FROM boats"),
    ("How many songs are there?", " SELECT COUNT(*) FROM songs"),
    ("Show the name of all cars.", " SELECT name FROM cars"),
    ("Show the city of all shops.", " SELECT city FROM shops"),
]
QUESTION = "How many doctors are there?"  # none of the rows asks it
s = ALPHA / RANK

# --- LoRA -------------------------------------------------------------------------------------------------------------
def lora(x, W, A, B):
    h = x @ A.T                # 1. (T, in) → (T, r)
    y = x @ W.T + s * h @ B.T  # 2. (T, in) → (T, out), and (T, r) → (T, out)
    return y, (x, W, A, B, h)

def lora_backward(dy, cache):
    """y = x Wᵀ has dx = dy W and dW = dyᵀ x. The same rule gives dB, dh and dA. W is frozen, so dW is never formed."""
    x, W, A, B, h = cache
    dB = s * dy.T @ h     # 2. (out, T) (T, r) → (out, r)
    dh = s * dy @ B       # 2. (T, out) → (T, r), all 0 in the first step, since B is 0: so is dA, and only B moves
    dA = dh.T @ x         # 1. (r, T) (T, in) → (r, in)
    dx = dy @ W + dh @ A  # 2. and 1. (T, out) → (T, in), and (T, r) → (T, in), because x went both ways
    return dx, dA, dB

def start(model, rng):
    """A uniform in ±1/√in, B zero: at first the adapted model computes what the base model does."""
    adapter = {}
    for site in SITES:
        W = np.stack([w[site] for w in model["layers"]])                      # (L, out, in)
        A = rng.uniform(-1, 1, (len(W), RANK, W.shape[2])) / W.shape[2]**0.5  # (L, r, in)
        adapter[site + ".A"], adapter[site + ".B"] = A.astype(W.dtype), np.zeros((*W.shape[:2], RANK), W.dtype)
    return adapter

def merge(model, adapter):
    """W + s B A in place of W: an ordinary model, as fast as the base model."""
    change = {site: s * adapter[site + ".B"] @ adapter[site + ".A"] for site in SITES}  # (L, out, in)
    layers = [w | {site: w[site] + change[site][i] for site in SITES} for i, w in enumerate(model["layers"])]
    return model | {"layers": layers}

# --- The other operations. Their weights are frozen, so a backward only hands the gradient on. ------------------------
def rmsnorm(x, gain, eps):
    rho = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)  # 1. (T, D) → (T, 1)
    x_hat = x / rho                                            # 2. (T, D)
    return x_hat * gain, (x_hat, rho, gain)                    # 3. (T, D)

def rmsnorm_backward(dy, cache):
    """x reaches x̂ = x/ρ directly and through ρ = √(mean(x²) + ε), so ∂x̂_i/∂x_j = (δ_ij − x̂_i x̂_j / D) / ρ."""
    x_hat, rho, gain = cache
    dx_hat = dy * gain                                                             # 3. (T, D)
    return (dx_hat - x_hat * (dx_hat * x_hat).mean(axis=-1, keepdims=True)) / rho  # 2. and 1.

def rope(x, angle):
    """Turn features i and i + d/2 of a head, a point in the plane, by the angle t · θ^(−2i/d). Backward: by −angle."""
    cos, sin = np.cos(angle)[:, None].astype(x.dtype), np.sin(angle)[:, None].astype(x.dtype)  # (T, d/2) → (T, 1, d/2)
    x1, x2 = np.split(x, 2, axis=-1)                                            # (T, heads, d) → two of (T, heads, d/2)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)  # → (T, heads, d)

def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)

def attention(q, k, v, angle):
    """Each token t looks at the tokens u ≤ t. A head of keys and values serves G query heads."""
    T, d = len(q), 2 * angle.shape[1]
    q, k, v = q.reshape(T, -1, d), k.reshape(T, -1, d), v.reshape(T, -1, d)  # → (T, H, d), (T, K, d), (T, K, d)
    q, k = rope(q, angle).reshape(T, k.shape[1], -1, d), rope(k, angle)      # 1. → (T, K, G, d), (T, K, d)
    S = np.einsum("tkgd,ukd->kgtu", q, k) / d**0.5                           # 2. q kᵀ/√d → (K, G, T, T)
    P = softmax(np.where(np.tri(T, dtype=bool), S, -np.inf))                 # 3. (K, G, T, T)
    y = np.einsum("kgtu,ukd->tkgd", P, v)                                    # 4. P v → (T, K, G, d)
    return y.reshape(T, -1), (q, k, v, P, angle)                             # → (T, H·d)

def attention_backward(dy, cache):
    """A row of softmax has ∂P_i/∂S_j = P_i (δ_ij − P_j), so dS_j = Σ_i dP_i ∂P_i/∂S_j = P_j (dP_j − Σ_i dP_i P_i)."""
    q, k, v, P, angle = cache
    T, K, G, d = q.shape
    dy = dy.reshape(q.shape)                                          # (T, H·d) → (T, K, G, d)
    dv = np.einsum("kgtu,tkgd->ukd", P, dy)                           # 4. Pᵀ dy → (T, K, d)
    dP = np.einsum("tkgd,ukd->kgtu", dy, v)                           # 4. dy vᵀ → (K, G, T, T)
    dS = P * (dP - (dP * P).sum(axis=-1, keepdims=True))              # 3. (K, G, T, T)
    dq = np.einsum("kgtu,ukd->tkgd", dS, k) / d**0.5                  # 2. dS k/√d → (T, K, G, d)
    dk = np.einsum("kgtu,tkgd->ukd", dS, q) / d**0.5                  # 2. dSᵀ q/√d → (T, K, d)
    dq, dk = rope(dq.reshape(T, K * G, d), -angle), rope(dk, -angle)  # 1. → (T, H, d), (T, K, d)
    return dq.reshape(T, -1), dk.reshape(T, -1), dv.reshape(T, -1)    # → (T, H·d), (T, K·d), (T, K·d)

def swiglu(gate, up):
    sigma = (1 + np.tanh(gate / 2)) / 2          # 1. (T, F), 1/(1 + e^−gate) in a form that cannot overflow
    return gate * sigma * up, (gate, up, sigma)  # 2. (T, F)

def swiglu_backward(dy, cache):
    """As σ' = σ (1 − σ), the derivative of z σ(z) is σ + z σ (1 − σ)."""
    gate, up, sigma = cache
    return dy * up * (sigma + gate * sigma * (1 - sigma)), dy * gate * sigma  # 2. and 1. dgate, dup

# --- The model: a list of calls, and the same list backwards ----------------------------------------------------------
def forward(model, adapter, tokens):
    """The logits (T, V): row t scores what may follow token t."""
    angle = np.outer(np.arange(len(tokens)), model["frequencies"])                     # (T, d/2)
    x, caches = model["embed_tokens"][tokens], []                                      # 1. (T,) → (T, D)
    for i, w in enumerate(model["layers"]):
        n, c_norm1 = rmsnorm(x, w["input_layernorm"], model["eps"])                    # 2. (T, D)
        q, c_q = lora(n, w["q_proj"], adapter["q_proj.A"][i], adapter["q_proj.B"][i])  # 3. (T, D) → (T, H·d)
        k = n @ w["k_proj"].T                                                          # 3. (T, D) → (T, K·d)
        v, c_v = lora(n, w["v_proj"], adapter["v_proj.A"][i], adapter["v_proj.B"][i])  # 3. (T, D) → (T, K·d)
        y, c_attention = attention(q, k, v, angle)                                     # 4. (T, H·d)
        x = x + y @ w["o_proj"].T                                                      # 5. (T, H·d) → (T, D)
        n, c_norm2 = rmsnorm(x, w["post_attention_layernorm"], model["eps"])           # 6. (T, D)
        y, c_swiglu = swiglu(n @ w["gate_proj"].T, n @ w["up_proj"].T)                 # 7. (T, D) → (T, F)
        x = x + y @ w["down_proj"].T                                                   # 8. (T, F) → (T, D)
        caches.append((c_norm1, c_q, c_v, c_attention, c_norm2, c_swiglu))
    n, c_norm = rmsnorm(x, model["norm"], model["eps"])                                # 9. (T, D)
    return n @ model["lm_head"].T, (caches, c_norm)                                    # 10. (T, D) → (T, V)

def backward(model, adapter, dlogits, cache):
    """The gradient of every A and B. Where x became x + branch, dx goes on unchanged, and dbranch is added to it."""
    caches, c_norm = cache
    grads = {name: np.zeros_like(p) for name, p in adapter.items()}
    dn = dlogits @ model["lm_head"]                                                # 10. (T, V) → (T, D)
    dx = rmsnorm_backward(dn, c_norm)                                              # 9. (T, D)
    for i in reversed(range(len(caches))):
        w, (c_norm1, c_q, c_v, c_attention, c_norm2, c_swiglu) = model["layers"][i], caches[i]
        dy = dx @ w["down_proj"]                                                   # 8. (T, D) → (T, F)
        dgate, dup = swiglu_backward(dy, c_swiglu)                                 # 7. (T, F)
        dn = dgate @ w["gate_proj"] + dup @ w["up_proj"]                           # 7. (T, F) → (T, D)
        dx = dx + rmsnorm_backward(dn, c_norm2)                                    # 6. (T, D)
        dy = dx @ w["o_proj"]                                                      # 5. (T, D) → (T, H·d)
        dq, dk, dv = attention_backward(dy, c_attention)                           # 4. (T, H·d), (T, K·d), (T, K·d)
        dn_v, grads["v_proj.A"][i], grads["v_proj.B"][i] = lora_backward(dv, c_v)  # 3. (T, K·d) → (T, D)
        dn_k = dk @ w["k_proj"]                                                    # 3. (T, K·d) → (T, D)
        dn_q, grads["q_proj.A"][i], grads["q_proj.B"][i] = lora_backward(dq, c_q)  # 3. (T, H·d) → (T, D)
        dx = dx + rmsnorm_backward(dn_q + dn_k + dn_v, c_norm1)                    # 2. (T, D)
    return grads                                                                   # 1. The embedding is frozen.

# --- Training ---------------------------------------------------------------------------------------------------------
def loss_and_gradients(model, adapter, examples):
    """The mean of −log P(token | those before it) over the completions. An example is (tokens, length of the prompt).
    With the logits z, −log P_target = log Σ_v exp(z_v) − z_target, and its gradient is dz = P − onehot(target)."""
    count = sum(len(tokens) - n for tokens, n in examples)
    loss, grads = 0.0, {name: np.zeros_like(p) for name, p in adapter.items()}
    for tokens, n in examples:
        logits, cache = forward(model, adapter, tokens[:-1])
        P = softmax(logits)                         # (T, V)
        targets = range(n - 1, len(P)), tokens[n:]  # row n − 1 scores token n, the first of the completion
        loss -= np.log(P[targets]).sum() / count
        dlogits = P / count                         # (T, V)
        dlogits[targets] -= 1 / count
        dlogits[: n - 1] = 0                        # the prompt is read, not trained
        for name, grad in backward(model, adapter, dlogits, cache).items():
            grads[name] += grad
    return loss, grads

def train(model, adapter, examples):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) with β₁ = 0.9 and β₂ = 0.999, on the adapter in place."""
    moments = {name: (np.zeros_like(p), np.zeros_like(p)) for name, p in adapter.items()}
    for t in range(1, STEPS + 1):
        loss, grads = loss_and_gradients(model, adapter, examples)  # first all gradients; then A and B move together
        for name, p in adapter.items():
            m, v = moments[name]
            m += (1 - 0.9) * (grads[name] - m)                      # the running mean of the gradient,
            v += (1 - 0.999) * (grads[name]**2 - v)                 # and of its square; both start at zero,
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)     # which is corrected here
            p -= RATE * (m_hat / (np.sqrt(v_hat) + 1e-8) + DECAY * p)
        print(f"step {t:2}  loss {loss:.4f}")

def answer(model, adapter, tokenizer, question):
    """The likeliest token, again and again. The whole text runs anew for each, as there is no key/value cache."""
    tokens = prompt = tokenizer.encode(question).ids
    while len(tokens) < len(prompt) + 30 and tokens[-1] != model["stop"]:
        tokens = [*tokens, int(forward(model, adapter, tokens)[0][-1].argmax())]
    return tokenizer.decode(tokens[len(prompt):])

# --- Files ------------------------------------------------------------------------------------------------------------
def load(folder, dtype=np.float32):
    """A model folder in Hugging Face's layout. model.layers.0.self_attn.q_proj.weight becomes layers[0]["q_proj"]."""
    c = json.loads((folder / "config.json").read_bytes())
    c |= c.get("rope_parameters") or {}                                      # where newer files keep rope_theta
    plain = dict(model_type="llama", hidden_act="silu", rope_scaling=None, rope_type="default")
    if any(c.get(key, value) != value for key, value in plain.items()):
        sys.exit(f"{folder}: this file computes only models with {plain}")
    d = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    frequencies = c.get("rope_theta", 10000.0) ** (-np.arange(0, d, 2) / d)  # (d/2,), θ^(−2i/d)
    model = {"eps": c["rms_norm_eps"], "frequencies": frequencies, "stop": int(np.ravel(c["eos_token_id"])[0])}
    model["layers"] = [{} for _ in range(c["num_hidden_layers"])]
    for name, tensor in deserialize((folder / "model.safetensors").read_bytes()):
        if tensor["dtype"] not in ("F32", "BF16") or name.endswith(".bias"):
            sys.exit(f"{folder}: {name} is in {tensor['dtype']}; this file reads weights in F32 or BF16, and no biases")
        bits = np.frombuffer(tensor["data"], np.uint32 if tensor["dtype"] == "F32" else np.uint16)
        array = bits.astype(np.uint32) << (32 - 8 * bits.itemsize)           # a bfloat16 is the upper half of a float32
        path = name.split(".")
        home = model["layers"][int(path[2])] if path[1] == "layers" else model
        home[path[-2]] = array.view(np.float32).reshape(tensor["shape"]).astype(dtype)
    return {"lm_head": model["embed_tokens"]} | model                        # a tied head is the embedding

def save(folder, adapter, base):
    """adapter_model.safetensors and adapter_config.json, as PEFT names and reads them."""
    name = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    tensors = {name.format(i, *key.split(".")): p[i] for key, p in adapter.items() for i in range(len(p))}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), bias="none")
    config |= dict(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=SITES)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))

if __name__ == "__main__":
    folder = Path(sys.argv[1] if sys.argv[1:] else MODEL).resolve()
    out = Path(sys.argv[2] if sys.argv[2:] else tempfile.mkdtemp() + "/adapter")
    out.mkdir(parents=True)  # an error if it exists: nothing is overwritten
    model, tokenizer = load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [(tokenizer.encode(ask).ids, tokenizer.encode(say, add_special_tokens=False).ids) for ask, say in ROWS]
    examples = [(prompt + completion + [model["stop"]], len(prompt)) for prompt, completion in rows]
    adapter = start(model, np.random.default_rng(0))
    print(f"before: {QUESTION}{answer(model, adapter, tokenizer, QUESTION)}")
    train(model, adapter, examples)
    print(f"after: {QUESTION}{answer(model, adapter, tokenizer, QUESTION)}")
    tokens, fresh = examples[0][0], start(model, np.random.default_rng(0))  # B = 0 again: fresh changes nothing
    adapted, merged = forward(model, adapter, tokens)[0], forward(merge(model, adapter), fresh, tokens)[0]  # (T, V)
    print(f"merged and adapted logits differ by {np.abs(adapted - merged).max():.0e} of {np.abs(adapted).max():.0f}")
    save(out, adapter, folder)
    print(f"the adapter is in {out}")
