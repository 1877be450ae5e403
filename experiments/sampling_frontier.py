"""At which sampling cost is which size best? Paper A, sections 3.3 and 3.4.

The U-Net family of unet_family.py. Each model draws with 4 to 50 steps of DDIM, DDPM
and DPM-Solver++ 2M at eight guidance scales, and the best guidance counts (figures 7 to
11). Distances are Frechet distances on features of a network whose weights you give.
Paper A says FID on captions of COCO-2014 but not which Inception; pytorch-fid's file is
the assumption here.

Cost: 11 models x 144 cells x 2,048 pictures; the plan counts only the training. Expect
small models to win at small costs and the 83M model at cost 3 (figure 9).
Command: python -m scaling_ldm.main --config experiments/sampling_frontier.py --workdir runs/frontier --config.evaluate.weights=pt_inception-2015-12-05-6726825d.pth
"""  # noqa: E501

import ml_collections

from experiments import unet_family


def get_config() -> ml_collections.ConfigDict:
    c = unet_family.get_config()
    c.name = "sampling_frontier"
    c.question = "At which sampling cost is which model size best?"
    c.generate.images, c.generate.batch_size = 2048, 256
    c.generate.sampler, c.generate.steps, c.generate.guidance = "ddim", 50, 7.5
    c.evaluate.network = "inception_pytorch_fid"
    c.evaluate.metrics = ("fd",)
    c.evaluate.reference_images = 30_000
    c.evaluate.through_training = True
    c.train.keep_checkpoints = 10
    c.frontier.images = 2048
    c.frontier.samplers = ("ddim", "ddpm", "dpm++2m")
    c.frontier.steps = (4, 6, 8, 10, 20, 50)
    c.frontier.guidances = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    return c
