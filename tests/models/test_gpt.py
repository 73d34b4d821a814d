import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smolcluster.errors import CheckpointError, ConfigError
from smolcluster.models.gpt import FP32_ATTENTION_TOKENS, GPT, Attention, GPTConfig, _attend

CONFIG = GPTConfig(vocab_size=13, model_dim=12, num_layers=2, num_heads=3, ff_dim=20, dropout=0.0, max_seq_len=8)


def trained_like(model: GPT) -> GPT:
    """Moves every parameter off its initial value, so that no bias is 0 and no norm 1."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return model


def some_tokens(batch: int, time: int, config: GPTConfig = CONFIG) -> Tensor:
    return torch.randint(config.vocab_size, (batch, time), generator=torch.Generator().manual_seed(1))


def naive_logits(w: dict[str, Tensor], tokens: Tensor, config: GPTConfig) -> Tensor:
    """GPT-2 written out from the exported weights: one position, one head at a time."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    width = config.model_dim // config.num_heads
    rows = []
    for row in tokens:
        x = torch.stack(
            [w["transformer.wte.weight"][token] + w["transformer.wpe.weight"][place] for place, token in enumerate(row)]
        )
        for layer in range(config.num_layers):
            h = f"transformer.h.{layer}"
            qkv = norm(x, f"{h}.ln_1") @ w[f"{h}.attn.c_attn.weight"] + w[f"{h}.attn.c_attn.bias"]
            out = torch.zeros_like(x)
            for head in range(config.num_heads):
                part = slice(head * width, (head + 1) * width)
                q, k, v = (qkv[:, i * config.model_dim : (i + 1) * config.model_dim][:, part] for i in range(3))
                for place in range(len(row)):
                    scores = (q[place] @ k[: place + 1].T) / math.sqrt(width)
                    out[place, part] = scores.softmax(0) @ v[: place + 1]
            x = x + out @ w[f"{h}.attn.c_proj.weight"] + w[f"{h}.attn.c_proj.bias"]
            up = gelu(norm(x, f"{h}.ln_2") @ w[f"{h}.mlp.c_fc.weight"] + w[f"{h}.mlp.c_fc.bias"])
            x = x + up @ w[f"{h}.mlp.c_proj.weight"] + w[f"{h}.mlp.c_proj.bias"]
        rows.append(norm(x, "transformer.ln_f") @ w["lm_head.weight"].T)
    return torch.stack(rows)


def test_logits_equal_gpt2_written_out_position_by_position() -> None:
    model = trained_like(GPT(CONFIG)).double()
    tokens = some_tokens(2, 8)
    expected = naive_logits(model.export_state_dict(), tokens, CONFIG)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)  # float64, sums of at most 20 terms


@pytest.mark.filterwarnings("ignore")
def test_transformers_gpt2_gives_the_same_logits_from_the_exported_weights() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=13, n_embd=12, n_layer=2, n_head=3, n_inner=20, n_positions=8, bos_token_id=0, eos_token_id=0
        )
    ).eval()
    model = trained_like(GPT(CONFIG))
    exported = model.export_state_dict()
    assert list(exported) == list(gpt2.state_dict())
    gpt2.load_state_dict(exported)
    tokens = some_tokens(2, 8)
    with torch.no_grad():
        # float64: another order of additions
        torch.testing.assert_close(gpt2.double()(tokens).logits, model.double()(tokens), rtol=0, atol=1e-12)
    back = GPT(CONFIG, seed=5).double()
    back.load_exported(gpt2.state_dict())
    assert torch.equal(back(tokens), model(tokens))


@pytest.mark.parametrize("tokens", [1, FP32_ATTENTION_TOKENS, FP32_ATTENTION_TOKENS + 1])
def test_short_attention_in_bf16_is_that_of_fp32_rounded_once(tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    attention = Attention(replace(CONFIG, max_seq_len=tokens))
    x = torch.randn(2, tokens, CONFIG.model_dim, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = (part.transpose(1, 2) for part in attention.qkv(x).unflatten(-1, (3, 3, -1)).unbind(-3))
        out = _attend(q, k, v, 0.0)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).bfloat16()
    assert out.dtype == torch.bfloat16
    is_exact = tokens <= FP32_ATTENTION_TOKENS
    torch.testing.assert_close(out, exact, rtol=0 if is_exact else 2**-6, atol=0 if is_exact else 2**-7)


def test_a_later_token_changes_no_earlier_logits() -> None:
    model = trained_like(GPT(CONFIG)).double()
    tokens = some_tokens(1, 8)
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()


def test_parameters_are_gpt2s_and_the_head_is_tied() -> None:
    model = GPT(CONFIG)
    d, f = CONFIG.model_dim, CONFIG.ff_dim
    block = 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (d * f + f) + (f * d + d)
    expected = CONFIG.vocab_size * d + CONFIG.max_seq_len * d + CONFIG.num_layers * block + 2 * d
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    # token 12 does not occur: only the head can give its row a gradient
    model(torch.zeros(1, 3, dtype=torch.int64)).square().sum().backward()
    assert model.token_embedding.weight.grad[12].abs().sum() > 0


def test_initial_values_are_gpt2s() -> None:
    config = replace(CONFIG, vocab_size=300, model_dim=96, ff_dim=384, max_seq_len=64, num_layers=8)
    model = GPT(config, seed=2)
    residual_std = 0.02 / (2 * 8) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            is_residual = name.endswith(("projection.weight", "down.weight"))
            std = residual_std if is_residual else 0.02
            # the smallest has 6144 draws: 5 % is more than 5 deviations
            assert abs(parameter.std() / std - 1) < 0.05, name
    uniform_loss = math.log(config.vocab_size)
    tokens = some_tokens(4, 64, config)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - uniform_loss) < 0.1  # logits near 0: all tokens about equally likely


def test_dropout_acts_in_training_only() -> None:
    model = trained_like(GPT(replace(CONFIG, dropout=0.5)))
    tokens = some_tokens(2, 8)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    without = trained_like(GPT(CONFIG))
    assert torch.equal(model(tokens), without(tokens))


@pytest.mark.parametrize("place", ["embedding", "attention weights", "attention output", "feed-forward output"])
def test_dropout_acts_at_each_of_its_places(place: str) -> None:
    model = trained_like(GPT(replace(CONFIG, num_layers=1)))
    tokens = some_tokens(2, 8)
    block = model.blocks[0]
    if place == "embedding":
        model.dropout.p = 0.5
    elif place == "attention weights":
        block.attention.dropout = 0.5
    else:
        # Only the sub-layer in question gives anything to drop.
        silenced = block.feed_forward.down if place == "attention output" else block.attention.projection
        torch.nn.init.zeros_(silenced.weight)
        torch.nn.init.zeros_(silenced.bias)
        block.dropout.p = 0.5
    torch.manual_seed(0)
    assert not torch.equal(model(tokens), model(tokens))


def test_a_batch_without_samples_gives_no_logits_and_zero_gradients() -> None:
    model = GPT(CONFIG)
    logits = model(torch.empty(0, 8, dtype=torch.int64))
    assert logits.shape == (0, 8, 13)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_a_sequence_beyond_max_seq_len_is_an_error_that_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"9 tokens is longer than model.max_seq_len 8"):
        GPT(CONFIG)(some_tokens(1, 9))


@pytest.mark.parametrize(
    ("key", "value"), [("num_heads", 5), ("num_layers", 0), ("vocab_size", 0), ("dropout", 1.0), ("dropout", -0.1)]
)
def test_impossible_sizes_are_errors_that_name_the_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"model.{key}"):
        replace(CONFIG, **{key: value})


# --- GPT-2's format


def test_export_has_gpt2s_names_and_shapes_in_its_order() -> None:
    exported = GPT(replace(CONFIG, num_layers=2)).export_state_dict()
    block = [
        ("ln_1.weight", (12,)),
        ("ln_1.bias", (12,)),
        ("attn.c_attn.weight", (12, 36)),
        ("attn.c_attn.bias", (36,)),
        ("attn.c_proj.weight", (12, 12)),
        ("attn.c_proj.bias", (12,)),
        ("ln_2.weight", (12,)),
        ("ln_2.bias", (12,)),
        ("mlp.c_fc.weight", (12, 20)),
        ("mlp.c_fc.bias", (20,)),
        ("mlp.c_proj.weight", (20, 12)),
        ("mlp.c_proj.bias", (12,)),
    ]
    expected = [
        ("transformer.wte.weight", (13, 12)),
        ("transformer.wpe.weight", (8, 12)),
        *((f"transformer.h.{layer}.{name}", shape) for layer in range(2) for name, shape in block),
        ("transformer.ln_f.weight", (12,)),
        ("transformer.ln_f.bias", (12,)),
        ("lm_head.weight", (13, 12)),
    ]
    assert [(name, tuple(value.shape)) for name, value in exported.items()] == expected
    assert exported["lm_head.weight"] is exported["transformer.wte.weight"]
    assert all(value.is_contiguous() and not value.requires_grad for value in exported.values())


@pytest.mark.parametrize("with_head", [True, False])
def test_an_exported_model_is_loaded_back_to_the_bit(with_head: bool) -> None:
    model = trained_like(GPT(CONFIG))
    exported = model.export_state_dict()
    if not with_head:  # as safetensors files have it: tied tensors once
        del exported["lm_head.weight"]
    other = GPT(CONFIG, seed=4)
    other.load_exported(exported)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_loading_foreign_tensors_names_them_and_changes_nothing() -> None:
    exported = trained_like(GPT(CONFIG)).export_state_dict()
    model = GPT(CONFIG, seed=4)
    name = "transformer.h.1.mlp.c_fc.weight"
    without = {key: value for key, value in exported.items() if key != name}
    foreign = {
        rf"1 missing \(first: \['{name}'\]\)": without,
        r"1 unknown \(first: \['extra'\]\)": {**exported, "extra": torch.zeros(1)},
        rf"{name} has shape \(20, 12\), but the model's sizes need \(12, 20\)": {**exported, name: exported[name].t()},
        "not tied": {**exported, "lm_head.weight": exported["lm_head.weight"] + 1},
    }
    for message, tensors in foreign.items():
        with pytest.raises(CheckpointError, match=message):
            model.load_exported(tensors)
    for key, value in GPT(CONFIG, seed=4).state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


# --- generation


def test_greedy_generation_takes_the_likeliest_token_of_the_whole_context() -> None:
    model = trained_like(GPT(CONFIG)).eval()
    tokens = some_tokens(2, 3)
    expected = tokens
    for _ in range(9):  # past max_seq_len 8: the context is its last 8 tokens
        last = model(expected[:, -8:])[:, -1]
        expected = torch.cat([expected, last.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(tokens, 9, temperature=0.0), expected)
    assert torch.equal(model.generate(tokens, 9, top_k=1, seed=3), expected)


def test_sampling_follows_seed_temperature_and_top_k() -> None:
    model = trained_like(GPT(CONFIG))
    tokens = some_tokens(1, 4)
    first = model.generate(tokens, 30, seed=1)
    assert first.shape == (1, 34)
    assert torch.equal(first[:, :4], tokens)
    assert torch.equal(first, model.generate(tokens, 30, seed=1))
    assert not torch.equal(first, model.generate(tokens, 30, seed=2))
    assert not torch.equal(first, model.generate(tokens, 30, temperature=5.0, seed=1))
    many = tokens.expand(400, -1)
    likeliest = model.eval()(tokens)[0, -1].topk(3).indices.tolist()
    drawn = model.generate(many, 1, temperature=2.0, top_k=3)[:, -1]
    assert set(drawn.tolist()) == set(likeliest)
    assert len(set(model.generate(many, 1, temperature=2.0)[:, -1].tolist())) > 3


def test_generation_is_without_dropout_and_restores_the_mode() -> None:
    model = trained_like(GPT(replace(CONFIG, dropout=0.5)))
    tokens = some_tokens(1, 4)
    assert torch.equal(model.generate(tokens, 20, temperature=0.0), model.generate(tokens, 20, temperature=0.0))
    assert model.training
    with_graph = []
    model.norm.register_forward_hook(lambda _module, _inputs, out: with_graph.append(out.requires_grad))
    model.eval().generate(tokens, 2)
    assert with_graph == [False, False]
    assert not model.training


def test_generation_refuses_what_it_cannot_do() -> None:
    model = GPT(CONFIG)
    with pytest.raises(ConfigError, match="at least one token"):
        model.generate(torch.empty(1, 0, dtype=torch.int64), 1)
    with pytest.raises(ConfigError, match="temperature is -1"):
        model.generate(some_tokens(1, 2), 1, temperature=-1)
    with pytest.raises(ConfigError, match="top_k is 0"):
        model.generate(some_tokens(1, 2), 1, top_k=0)
