"""What does paper A's 866M U-Net learn from pictures in a bucket, and at what cost?

The recipe is that of unet_866m.py. The pictures are WebDataset shards of 512 px and
more in a bucket, and so are their records.

Cost: 2.5e21 FLOPs, and encoding each picture once. Expect FID 21.55 and CLIP score
0.312 on COCO with 50 steps of DDIM at guidance 7.5, if the data were paper A's (arXiv
2404.01367, table 1); they are not public.
Put your bucket's name in place of my-bucket, here or by flags. Packages: gcsfs.
Command: python -m scaling_ldm.main --config experiments/unet_866m_bucket.py
"""

import ml_collections

from experiments import unet_family


def get_config() -> ml_collections.ConfigDict:
    c = unet_family.paper_a("unet_866m_bucket", 320)
    c.question = "What does the 866M U-Net learn from pictures in a bucket?"
    c.data.path = "gs://my-bucket/pictures"
    c.data.split_by = "caption_alone"
    c.data.shuffle_window = 4
    c.encode.path = "gs://my-bucket/records-512"
    return c
