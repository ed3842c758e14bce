"""Our logits are those of transformers' GPT-2 and Llama, given the same weights."""

import pytest
import torch
from torch import Tensor, nn

from gptlab.config.registry import component, load_components
from gptlab.config.schema import ModelConfig
from gptlab.model.transformer import Transformer, new_model

transformers = pytest.importorskip("transformers")
load_components()


def config(width: int, depth: int, heads: int, context_length: int, bias: bool, **parts: tuple[str, dict]) -> ModelConfig:
    options = {slot: component(f"model/{slot}", name).options(**values) for slot, (name, values) in parts.items()}
    return ModelConfig(width=width, depth=depth, heads=heads, context_length=context_length, bias=bias, **options)


def stir(model: nn.Module) -> None:
    """Weights large enough for every part to matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def load(ours: Transformer, weights: dict[str, Tensor]) -> None:
    """Copy by our names; every parameter must be given, in its own shape."""
    with torch.no_grad():
        own = dict(ours.named_parameters())
        assert own.keys() == weights.keys()
        for name, value in weights.items():
            assert own[name].shape == value.shape, name
            own[name].copy_(value)


def agree(ours: Transformer, theirs: nn.Module, vocabulary: int, length: int, tolerance: float) -> None:
    tokens = torch.randint(vocabulary, (3, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        mine, other = ours(tokens), theirs(tokens).logits
    assert other.std() > 0.5  # flat logits would agree with anything
    torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["naive", "sdpa"])
@pytest.mark.parametrize("shape", [(30, 3, 5, 13, 29), (16, 1, 1, 7, 11)], ids=str)
def test_logits_are_gpt2s(shape: tuple[int, ...], kernel: str, dtype: torch.dtype) -> None:
    width, depth, heads, context, vocabulary = shape
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
            n_embd=width,
            n_layer=depth,
            n_head=heads,
            attn_implementation="eager",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    theirs = theirs.to(dtype).eval()
    stir(theirs)
    ours = new_model(
        config(
            width,
            depth,
            heads,
            context,
            True,
            norm=("layernorm", {}),
            position=("learned", {}),
            attention=("multihead", {}),
            kernel=(kernel, {}),
            ffn=("gelu", {}),
            block=("prenorm", {}),
            head=("tied", {}),
            init=("gpt2", {}),
        ),
        vocabulary,
        seed=0,
    )
    ours = ours.to(dtype).eval()
    state = theirs.state_dict()
    renamed = {
        "ln_1": "attention_norm", "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out",
        "ln_2": "ffn_norm", "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down",
    }  # fmt: skip
    weights = {"embedding.weight": state["transformer.wte.weight"], "position.table.weight": state["transformer.wpe.weight"]}
    for part in ("weight", "bias"):
        weights[f"norm.{part}"] = state[f"transformer.ln_f.{part}"]
        for layer in range(depth):
            for old, new in renamed.items():
                value = state[f"transformer.h.{layer}.{old}.{part}"]
                # GPT-2's products are stored input by output
                weights[f"blocks.{layer}.{new}.{part}"] = value.T if ".c_" in old and part == "weight" else value
    load(ours, weights)
    agree(ours, theirs, vocabulary, context, 1e-12 if dtype is torch.float64 else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["naive", "sdpa"])
@pytest.mark.parametrize("shape", [(36, 2, 6, 3, 50, 13, 29), (20, 3, 5, 1, 21, 9, 11), (24, 1, 2, 2, 64, 5, 7)], ids=str)
def test_logits_are_llamas(shape: tuple[int, ...], kernel: str, dtype: torch.dtype) -> None:
    width, depth, heads, kv_heads, hidden, context, vocabulary = shape
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            attention_bias=False,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    theirs = theirs.to(dtype).eval()
    stir(theirs)
    ours = new_model(
        config(
            width,
            depth,
            heads,
            context,
            False,
            norm=("rmsnorm", {"eps": 1e-6}),
            position=("rotary", {}),
            attention=("multihead", {"kv_heads": kv_heads}),
            kernel=(kernel, {}),
            ffn=("swiglu", {"expansion": hidden / width, "multiple_of": 1}),
            block=("prenorm", {}),
            head=("untied", {}),
            init=("gpt2", {}),
        ),
        vocabulary,
        seed=0,
    )
    ours = ours.to(dtype).eval()
    state = theirs.state_dict()
    weights = {"embedding.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    weights["head.weight"] = state["lm_head.weight"]
    for layer in range(depth):
        old, new = f"model.layers.{layer}", f"blocks.{layer}"
        weights[f"{new}.attention_norm.weight"] = state[f"{old}.input_layernorm.weight"]
        weights[f"{new}.attention.qkv.weight"] = torch.cat([state[f"{old}.self_attn.{p}_proj.weight"] for p in "qkv"])
        weights[f"{new}.attention.out.weight"] = state[f"{old}.self_attn.o_proj.weight"]
        weights[f"{new}.ffn_norm.weight"] = state[f"{old}.post_attention_layernorm.weight"]
        weights[f"{new}.ffn.up.weight"] = torch.cat([state[f"{old}.mlp.{p}_proj.weight"] for p in ("gate", "up")])
        weights[f"{new}.ffn.down.weight"] = state[f"{old}.mlp.down_proj.weight"]
    load(ours, weights)
    # transformers computes the norms and the angles in fp32 whatever the model's dtype
    agree(ours, theirs, vocabulary, context, 1e-6 if dtype is torch.float64 else 2e-5)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20)])
def test_t5s_buckets_are_t5s(buckets: int, max_distance: int) -> None:
    position = component("model/position", "t5").factory(2, buckets=buckets, max_distance=max_distance)
    with torch.no_grad():
        position.table.copy_(torch.arange(buckets)[:, None].expand(-1, 2))  # a score that names its bucket
    place = torch.arange(200)
    found = position.bias(torch.tensor(0), place[:, None], place[None])
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    expected = bucket(place[None] - place[:, None], bidirectional=False, num_buckets=buckets, max_distance=max_distance)
    assert torch.equal(found.long(), expected)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [(8, [2.0**-n for n in range(1, 9)]), (3, [2.0**-4, 2.0**-8, 2.0**-2]), (1, [2.0**-8])],
)
def test_alibis_slopes_are_the_papers(heads: int, slopes: list[float]) -> None:
    position = component("model/position", "alibi").factory(heads)
    fall = position.bias(torch.arange(heads), torch.tensor(9), torch.tensor(7))
    torch.testing.assert_close(fall, -2 * torch.tensor(slopes))
