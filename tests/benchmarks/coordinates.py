"""Coordinate check: what grows with the width under a policy of the learning rate.

    python tests/benchmarks/coordinates.py --architectures in_context --widths 64,128

Networks of several widths take a few steps on random pictures. Printed are the slopes
of ln size on ln width, for the mean |x| of what every module returns and for the
spectral norm of every tensor's change: the largest ones of each policy and network. The
first width is the base width. --all prints every slope.
"""

from __future__ import annotations

import argparse

from scaling_ldm import config
from scaling_ldm.training import coordinate_check


def experiment(
    architecture: str,
    policy: str,
    base_width: int,
    rate: float,
    batch: int,
    eps: float = 1e-15,
) -> config.Experiment:
    """A small network on pictures of 8 x 8, with heads of 16.

    Args:
      eps: Adam's. Gradients behind a gate that starts at zero are as small as the usual
        1e-8 in the first steps, and smaller the wider the network.
    """
    c = config.default()
    c.data.shape = (8, 8, 3)
    c.data.text_tokens, c.data.vocab_size = 4, 32
    c.encode.text_encoder = "vocabulary"
    c.model.architecture = architecture
    c.model.head_dim, c.model.compute_dtype = 16, "float32"
    if architecture != "adaln_zero":
        c.model.text_width = 16
    else:
        c.model.classes = 16
    if architecture != "unet":
        c.model.time_width = 16
    c.optimizer.learning_rate_policy = policy
    if policy != "fixed":
        c.optimizer.policy_width = base_width
    c.optimizer.learning_rate, c.optimizer.eps = rate, eps
    c.plan.sizes = ((base_width, 2),)
    c.train.batch_size = batch
    return config.resolve(c)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", default="in_context")
    parser.add_argument("--policies", default="fixed,mup")
    parser.add_argument("--widths", default="64,128,256,512")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--eps", type=float, default=1e-15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--all", action="store_true")
    given = parser.parse_args()
    widths = tuple(int(width) for width in given.widths.split(","))
    for architecture in given.architectures.split(","):
        for policy in given.policies.split(","):
            given_to = widths[0], given.rate, given.batch, given.eps
            found = coordinate_check.check(
                experiment(architecture, policy, *given_to),
                widths,
                given.depth,
                steps=given.steps,
                seeds=range(given.seeds),
            )
            slopes = sorted(found.slopes().items(), key=lambda item: -abs(item[1]))
            print(f"{architecture}, {policy}: {len(slopes)} sizes")
            for name, slope in slopes if given.all else slopes[:5]:
                sizes = (found.activations | found.updates)[name]
                shown = ", ".join(f"{size:.4g}" for size in sizes)
                print(f"  {slope:+.3f}  {name}: {shown}", flush=True)


if __name__ == "__main__":
    main()
