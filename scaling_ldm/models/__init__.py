"""Networks as pure functions of nested dicts of arrays.

Folders:

- denoisers: networks that are trained as diffusion models.
- encoders: autoencoders, text encoders, and networks that judge pictures.
- weights: reads and writes published parameters.

From an experiment to a network:

- from_config: the network of an experiment at a size.
- pretrained: frozen networks by name.

Parts that the networks share:

- layers: initial values, patches, norms, stacks of blocks.
- positions: where a token is.
- shapes: letters of the axes, and names of the array types.
- remat: what a block keeps for its backward pass.
- sharded: parameters that devices share.

Attention:

- attention: softmax attention with its own reverse derivative.
- attention_backends: the plain form, or a kernel of the backend.
- attention_kernel: the kernels for TPUs, in Pallas.

May import: records, config.
"""
