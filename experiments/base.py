"""What the experiments of paper B share. All other fields keep their defaults.

Paper B is "Scaling Laws for Diffusion Transformers" (arXiv 2410.08184): in-context
transformers of width 64 x depth, batch 1024, a fixed learning rate of 1e-4, rectified
flow with logit-normal t, 256 image tokens and the tokens of the caption. The paper does
not say, and these files assume: 77 text tokens, AdamW (0.9, 0.999) without decay,
clipping at 1, warm-up over 2% of the steps, bfloat16 arithmetic, caption dropout 0.1,
and the two power-function averages of the weights that every study keeps.

The pictures are the embedded icons, 32 x 32 x 3, in patches of 2. These are 256 tokens,
as many as the 32 x 32 x 4 latents of a picture of 256 px have. For latents of your own
pictures (see docs/own_pictures.md):

    python -m scaling_ldm.main --config experiments/dit_1e17.py --workdir runs/mine --config.data.source=image_folder --config.data.path=FOLDER --config.data.shape='(32, 32, 4)' --config.encode.autoencoder=FOLDER_OR_HUB_ID
"""  # noqa: E501

import ml_collections

from scaling_ldm import config


def paper_b(name: str, *budgets_flops: float) -> ml_collections.ConfigDict:
    """The isoFLOP grid of paper B at the given budgets."""
    c = config.default()
    c.name = name
    c.question = "Which size and how much data are best at a given training compute?"
    c.data.text_tokens = 77
    c.data.vocab_size = 8192
    c.plan.budgets_flops = budgets_flops
    return c
