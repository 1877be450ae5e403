"""Numbers of image quality, from features and from pixels.

`moments` holds the mean and covariance of features, `frechet` the Frechet distance
(FID), `kernel` KID, `manifold` precision and recall, `classifier_score` the Inception
Score, `pairs` PSNR and SSIM, `resize` Pillow's resizes, `tfgan` TensorFlow-GAN's
version of the Frechet distance. Everything is numpy and scipy in float64; jax and
TensorFlow are not imported. May import: records.
"""

from scaling_ldm.metrics.classifier_score import inception_score
from scaling_ldm.metrics.estimate import Estimate
from scaling_ldm.metrics.frechet import Reference
from scaling_ldm.metrics.frechet import distance as frechet_distance
from scaling_ldm.metrics.frechet import infinity as frechet_infinity
from scaling_ldm.metrics.frechet import interval as frechet_interval
from scaling_ldm.metrics.kernel import kid
from scaling_ldm.metrics.manifold import precision_recall
from scaling_ldm.metrics.moments import Moments
from scaling_ldm.metrics.pairs import psnr, ssim

__all__ = [
    "Estimate",
    "Moments",
    "Reference",
    "frechet_distance",
    "frechet_infinity",
    "frechet_interval",
    "inception_score",
    "kid",
    "precision_recall",
    "psnr",
    "ssim",
]
