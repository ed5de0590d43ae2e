"""CLIP against transformers, the prompt port, and the image states."""

import subprocess
import sys

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from dit_booth.inject import Injection, PromptTokens
from dit_booth.models.clip.encoders import (
    NULL_PROMPT,
    ClipConfig,
    ImageEncoder,
    TextEncoder,
    build_clip,
    build_clip_model,
    contrastive_forward,
)

RANDOM = ClipConfig(pretrained="none")


@pytest.fixture(scope="module", autouse=True)
def quiet_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def towers() -> tuple[TextEncoder, ImageEncoder]:
    torch.manual_seed(0)
    return build_clip(RANDOM)


# ---- transformers as the oracle ---------------------------------------------------------------------------


def shake(model: nn.Module) -> nn.Module:
    """Random weights everywhere: initial biases of 0 and norms of 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def to_transformers(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """open_clip's tower -> transformers' names, with the fused projection split."""
    renames = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
        "ln_final": "final_layer_norm",
        "transformer.resblocks": "encoder.layers",
        ".attn.": ".self_attn.",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "c_fc": "fc1",
        "c_proj": "fc2",
    }
    out = {}
    for name, value in state.items():
        name = name.removeprefix(prefix)
        if name in ("text_projection", "proj"):
            continue
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        if "in_proj_" in name:
            for letter, part in zip(
                "qkv", rearrange(value, "(three d) ... -> three d ...", three=3), strict=True
            ):
                out[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            out[name] = value
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_text_equals_transformers(dtype, tolerance):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = TextEncoder(shake(build_clip_model(RANDOM)).to(dtype))
    config = CLIPTextConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=24, hidden_act="quick_gelu", eos_token_id=2047, bos_token_id=2046,
        attn_implementation="sdpa",
    )  # fmt: skip
    oracle = CLIPTextModel(config).to(dtype).eval()
    oracle.load_state_dict(to_transformers(text.state_dict()), strict=True)
    prompt = text.tokenize(["a red dog runs on grass", NULL_PROMPT, "one " * 40])
    with torch.no_grad():
        ours, theirs = text(prompt), oracle(input_ids=prompt.ids)
    assert (ours.tokens - theirs.last_hidden_state).abs().max() <= tolerance
    assert (ours.pooled - theirs.pooler_output @ text.text_projection).abs().max() <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_image_states_equal_transformers(dtype, tolerance):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    encoder = ImageEncoder(shake(build_clip_model(RANDOM)).to(dtype))
    config = CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=3, image_size=32,
        patch_size=4, hidden_act="quick_gelu", attn_implementation="sdpa",
    )  # fmt: skip
    oracle = CLIPVisionModel(config).to(dtype).eval()
    oracle.load_state_dict(to_transformers(encoder.state_dict(), "visual."), strict=True)
    image = torch.rand(2, 3, 32, 32, dtype=dtype) * 2 - 1
    with torch.no_grad():
        ours = encoder(image)
        theirs = oracle(pixel_values=encoder.preprocess(image), output_hidden_states=True)
    hidden = [theirs.last_hidden_state, *(theirs.hidden_states[k] for k in (1, 1, 2, 3))]
    for state, expected in zip(ours.states, hidden, strict=True):
        assert state.shape == (2, encoder.tokens, encoder.width)
        assert (state - expected).abs().max() <= tolerance
    assert (ours.embedding - theirs.pooler_output @ encoder.visual.proj).abs().max() <= tolerance


def test_layers_are_videobooths_for_vit_l():
    import open_clip

    with torch.device("meta"):
        visual = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14-quickgelu")).visual
    visual.image_mean = visual.image_std = (0.5, 0.5, 0.5)
    model = nn.Module()
    model.visual = visual
    assert ImageEncoder(model).layers == (24, 4, 8, 12, 16)


# ---- text tower and prompt port ---------------------------------------------------------------------------


def test_pooled_equals_open_clips_encode_text():
    model = shake(build_clip_model(RANDOM))
    text = TextEncoder(model)
    prompt = text.tokenize(["a red dog", "two blue rings in the sky"])
    first_end = (prompt.ids == 2047).int().argmax(dim=1, keepdim=True)
    padded_with_zero = torch.where(torch.arange(24) > first_end, 0, prompt.ids)
    assert (padded_with_zero == 0).any()
    torch.testing.assert_close(text(prompt).pooled, model.encode_text(padded_with_zero), rtol=0, atol=1e-5)


def test_parameter_names_are_open_clips(towers):
    text, image = towers
    names = set(build_clip_model(RANDOM).state_dict())
    assert set(text.state_dict()) | set(image.state_dict()) == names - {"logit_scale"}
    assert "attn_mask" not in text.state_dict()


class Shift(nn.Module):
    """Puts `n` new embeddings at position `at` and shifts the tail, as token replacement does."""

    def __init__(self, at: int, n: int, dim: int) -> None:
        super().__init__()
        self.at, self.new = at, nn.Parameter(torch.randn(n, dim))

    def forward(self, words: PromptTokens, condition) -> PromptTokens:
        batch, length = words.ids.shape
        tail = length - self.at - len(self.new)

        def shifted(values, new):
            return torch.cat([values[:, : self.at], new, values[:, self.at : self.at + tail]], dim=1)

        spans = torch.ones(batch, len(self.new), dtype=torch.long)
        return PromptTokens(
            shifted(words.embeddings, self.new.expand(batch, -1, -1)),
            shifted(words.ids, torch.full_like(spans, 7)),
            shifted(words.spans, spans),
            words.subjects,
        )


def test_injected_embeddings_equal_written_ids(towers):
    """Injecting the embeddings of other words equals writing those words, pooled state included."""
    text, _ = towers
    prompt = text.tokenize(["a dog runs"])
    longer = text.tokenize(["a dog red blue runs"])
    tap = Shift(3, 2, text.width)
    tap.new.data = text.token_embedding(longer.ids[0, 3:5])
    injected, written = text(prompt, Injection({"text.prompt": [(tap, None)]})), text(longer)
    torch.testing.assert_close(injected.tokens, written.tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(injected.pooled, written.pooled, rtol=0, atol=1e-6)
    injected.pooled.sum().backward()
    assert tap.new.grad is not None and tap.new.grad.abs().min() > 0
    assert text.sites()[0].dim == text.width and text.sites()[0].port == "prompt"


def test_last_position_is_pooled_where_the_end_token_is_pushed_out(towers):
    text, _ = towers
    prompt = text.tokenize(["a " * 30])
    out = text(prompt, Injection({"text.prompt": [(Shift(1, 2, text.width), None)]}))
    torch.testing.assert_close(out.pooled, out.tokens[:, -1] @ text.text_projection)


def test_shorter_prompts_are_accepted(towers):
    text, _ = towers
    prompt = text.tokenize(["a dog runs"])
    short = text(prompt.each(lambda y: y[:, :9]))
    torch.testing.assert_close(short.tokens, text(prompt).tokens[:, :9], rtol=0, atol=1e-5)
    torch.testing.assert_close(short.pooled, text(prompt).pooled, rtol=0, atol=1e-5)


# ---- image tower ------------------------------------------------------------------------------------------


def test_preprocess_resizes_and_normalises(towers):
    _, encoder = towers
    white = ((1 - encoder.mean) / encoder.std).expand(1, 3, 32, 32)
    torch.testing.assert_close(encoder.preprocess(torch.ones(1, 3, 50, 70)), white)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(encoder.preprocess(image) * encoder.std + encoder.mean, (image + 1) / 2)
    checker = torch.ones(1, 3, 128, 128)
    checker[..., ::2, :] = -1
    grey = encoder.preprocess(checker) * encoder.std + encoder.mean
    assert (grey - 0.5).abs().max() < 0.1, "without antialiasing the stripes would survive"
    with pytest.raises(ValueError, match=r"\(3, 32, 32\).*expected \(b, 3, h, w\)"):
        encoder(torch.zeros(3, 32, 32))


def test_towers_are_frozen_and_the_image_tower_stays_in_eval(towers):
    text, encoder = towers
    assert not any(p.requires_grad for tower in towers for p in tower.parameters())
    assert not encoder.train().training and not encoder.visual.training and not text.training


def test_tiny_clip_is_small(towers):
    text, encoder = towers
    image, words = (sum(p.numel() for p in tower.parameters()) for tower in (encoder, text))
    assert image <= 500_000 and image + words <= 1_200_000


def test_contrastive_forward_trains_both_towers():
    model = build_clip_model(RANDOM)
    prompt = TextEncoder(model).tokenize(["a red ring", "a blue star"], ["ring", "star"])
    image, text, scale = contrastive_forward(model, torch.rand(2, 3, 64, 64) * 2 - 1, prompt)
    assert image.shape == text.shape == (2, 128)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(scale, model.logit_scale.exp())
    nn.functional.cross_entropy(scale * image @ text.T, torch.arange(2)).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == []


def test_help_stays_fast():
    """Importing the configurations loads nothing heavy; the encoders wait for the libraries below them."""
    script = """if True:
        import sys
        from dit_booth.models.autoencoder import config
        from dit_booth.models.clip import config
        assert "torch" not in sys.modules
        from dit_booth.models.autoencoder import model
        from dit_booth.models.clip import encoders
        assert not {"open_clip", "diffusers", "transformers"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_lower_precision_runs(towers):
    model = build_clip_model(RANDOM).to(torch.bfloat16)
    text, encoder = TextEncoder(model), ImageEncoder(model)
    assert text(text.tokenize(["a dog"])).pooled.dtype == torch.bfloat16
    assert encoder(torch.zeros(1, 3, 40, 40)).embedding.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert towers[0](text.tokenize(["a dog"])).tokens.isfinite().all()
