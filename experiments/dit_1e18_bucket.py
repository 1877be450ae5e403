"""Which of seven DiT sizes is best at 1e18 FLOPs, on latents of pictures in a bucket?

The grid is that of dit_1e18.py. The pictures are WebDataset shards of 256 px and more
with captions, the latents are those of Stable Diffusion's autoencoder, and the captions
are features of CLIP's text encoder. Paper B's own data and text encoder are not public,
so losses differ from its. Records are shuffled in windows of four shards, so that each
host reads few files.

Cost: 7 x 1e18 FLOPs, and encoding each picture once. Expect an optimum near 15M
parameters.
Put your bucket's name in place of my-bucket, here or by flags. Packages: gcsfs.
Command: python -m scaling_ldm.main --config experiments/dit_1e18_bucket.py
"""

import ml_collections

from experiments import base


def get_config() -> ml_collections.ConfigDict:
    c = base.paper_b("dit_1e18_bucket", 1e18)
    c.question = "Which size is best at 1e18 FLOPs on latents of real pictures?"
    c.data.source, c.data.path = "webdataset", "gs://my-bucket/pictures"
    c.data.shape = (32, 32, 4)
    c.data.split_by = "caption_alone"
    c.data.shuffle_window = 4
    c.encode.autoencoder = "stabilityai/sd-vae-ft-mse"
    c.encode.text_encoder = "openai/clip-vit-large-patch14"
    c.encode.path = "gs://my-bucket/records-256"
    c.encode.batch_size = 256
    c.model.text_width = 768
    return c
