"""Training on devices, and trained or frozen networks run on them.

`mesh` places arrays, `objective` holds what is learnt, `optimizer` and `averages`
change the weights, `train_step` compiles a step. `loop` trains one run, `checkpoint`
stores its state under a `checksum`, `progress` reports on it. `inference` draws
pictures with trained weights; `encoding` runs frozen networks. The modules are the
public names. They are imported one by one, because some of them are read without jax.
May import: records, config, flops, models, diffusion, data.
"""
