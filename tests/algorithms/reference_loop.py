"""A training loop of a small GPT that knows nothing of smolcluster: plain PyTorch, written a second time.

Only the initial weights come from outside, as tensors. What a gradient, a clip, an optimizer step and a delayed
gradient are is decided here.
"""

import torch
import torch.nn.functional as F


def make_batches(steps, batch, time, vocab, seed):
    """Random token windows, (batch, time + 1) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (batch, time + 1), generator=generator) for _ in range(steps)]


def gpt_logits(w, tokens, heads):
    """A pre-norm transformer with tied head; `w` maps GPT names to tensors."""
    (batch, time), dim = tokens.shape, w["token_embedding.weight"].shape[1]
    x = w["token_embedding.weight"][tokens] + w["position_embedding.weight"][:time]
    hidden = torch.full((time, time), float("-inf"), dtype=x.dtype).triu(1)
    layer = 0
    while f"blocks.{layer}.attention.qkv.weight" in w:
        p = f"blocks.{layer}."
        y = F.layer_norm(x, (dim,), w[p + "attention_norm.weight"], w[p + "attention_norm.bias"])
        qkv = y @ w[p + "attention.qkv.weight"].T + w[p + "attention.qkv.bias"]
        q, k, v = (part.view(batch, time, heads, -1).transpose(1, 2) for part in qkv.split(dim, dim=2))
        attention = (q @ k.transpose(2, 3) / (dim // heads) ** 0.5 + hidden).softmax(-1)
        y = (attention @ v).transpose(1, 2).reshape(batch, time, dim)
        x = x + y @ w[p + "attention.projection.weight"].T + w[p + "attention.projection.bias"]
        y = F.layer_norm(x, (dim,), w[p + "feed_forward_norm.weight"], w[p + "feed_forward_norm.bias"])
        y = F.gelu(y @ w[p + "feed_forward.up.weight"].T + w[p + "feed_forward.up.bias"], approximate="tanh")
        x = x + y @ w[p + "feed_forward.down.weight"].T + w[p + "feed_forward.down.bias"]
        layer += 1
    return F.layer_norm(x, (dim,), w["norm.weight"], w["norm.bias"]) @ w["token_embedding.weight"].T


def train(weights, batches, heads, learning_rates, weight_decay, clip, delay=0):
    """AdamW on the mean loss; the gradient of step t is applied after that of step t + delay was computed.

    Returns:
        (loss of every step, gradient norm of every step, final weights).
    """
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    params = list(weights.values())
    optimizer = torch.optim.AdamW(params, lr=0.0, weight_decay=weight_decay, foreach=False)
    waiting, losses, norms = [], [], []

    def apply_oldest():
        for param, grad in zip(params, waiting.pop(0), strict=True):
            param.grad = grad
        optimizer.param_groups[0]["lr"] = learning_rates[len(norms)]
        norms.append(torch.nn.utils.clip_grad_norm_(params, clip).item())
        optimizer.step()

    for batch in batches:
        logits = gpt_logits(weights, batch[:, :-1], heads)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        waiting.append(torch.autograd.grad(loss, params))
        losses.append(loss.item())
        if len(waiting) > delay:
            apply_oldest()
    while waiting:
        apply_oldest()
    return losses, norms, {name: tensor.detach() for name, tensor in weights.items()}
