"""Features and scores are those of transformers' `CLIPModel` and its tokenizer."""

import json

import numpy as np
import pytest

from scaling_ldm.models.encoders import clip, clip_features, clip_score
from scaling_ldm.models.weights import clip as weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SIDE, TOKENS = 12, 7
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
LETTERS = [*"abcdegort", *(f"{letter}</w>" for letter in "abcdegort")]
VOCABULARY = [*LETTERS, "ca", "cat</w>", *SPECIAL]
CAPTIONS = ["a cat", "A dog eats a big red goat to death", "", "got CAT"]
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module", params=[2, len(VOCABULARY) - 1], ids=["legacy", "end"])
def case(request, tmp_path_factory):
    """(their network, their tokenizer, ours)."""
    config = transformers.CLIPConfig(
        text_config={
            **COMMON,
            "vocab_size": len(VOCABULARY),
            "max_position_embeddings": TOKENS,
            "eos_token_id": request.param,
        },
        vision_config={**COMMON, "image_size": SIDE, "patch_size": 4},
        projection_dim=20,
    )
    torch.manual_seed(0)
    net = transformers.CLIPModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    place = tmp_path_factory.mktemp("clip")
    net.eval().save_pretrained(place)
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    (place / "vocab.json").write_text(json.dumps(ids))
    (place / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>")
    settings = {"tokenizer_class": "CLIPTokenizer"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(place)
    return net, tokenizer, weights.open_both(place)


def pictures():
    rng = np.random.default_rng(1)
    return rng.uniform(0, 255, (len(CAPTIONS), SIDE, SIDE, 3)).astype("f")


def run(case):
    net, tokenizer, _ = case
    x = torch.from_numpy((pictures() / 255 - clip.MEAN) / clip.STD)
    text = tokenizer(
        CAPTIONS, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        return net(**text, pixel_values=x.permute(0, 3, 1, 2))


def relative(ours, wanted):
    wanted = wanted.detach().numpy()
    return np.abs(np.asarray(ours) - wanted).max() / np.abs(wanted).max()


def test_scores(case):
    net, _, ours = case
    wanted = run(case)
    images, texts = ours.pictures(pictures()), ours.captions(CAPTIONS)
    scale = net.logit_scale.exp().item()
    cosines = wanted.logits_per_image / scale
    score = clip_score.clip_score(images, texts)
    assert relative(score, 100 * cosines.diagonal()) <= 1e-4
    (n, m), rows = (len(images), len(texts)), np.asarray(images)
    every = clip_score.cosine(np.repeat(rows, m, 0), np.tile(texts, (n, 1)))
    assert relative(every.reshape(n, m), cosines) <= 1e-4
    both = torch.cat([cosines.diagonal(), -cosines.diagonal()])
    twice, signed = np.tile(images, (2, 1)), np.concatenate([texts, -texts])
    hessel = clip_score.clip_s(twice, signed)
    assert relative(hessel, 2.5 * both.clamp(min=0)) <= 1e-4
    assert 0 < (hessel == 0).sum() < len(hessel)
    theirs = wanted.image_embeds
    assert (
        relative(
            clip_score.clip_i(images[:3], images[1:]),
            torch.mean(theirs[:3] @ theirs[1:].T),
        )
        <= 1e-4
    )


def test_features_are_vectors_before_their_length_is_made_1(case):
    net, _, ours = case
    x = torch.from_numpy((pictures() / 255 - clip.MEAN) / clip.STD)
    with torch.no_grad():
        hidden = net.vision_model(x.permute(0, 3, 1, 2)).pooler_output
        wanted = net.visual_projection(hidden)
    found = clip_features.apply(ours.image, ours.params["image"], pictures())
    assert relative(found.features, wanted) <= 1e-4
    assert np.abs(np.linalg.norm(found.features, axis=1) - 1).min() > 0.1
