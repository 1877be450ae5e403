"""Reads and writes published weights: pairs the tensors of each layout with our trees.

One module per network gives the published names of its leaves. layout pairs leaves with
tensors, blocks does so for stacked transformers, batch_norm folds fixed norms. files
and torch_file read checkpoints, hub finds them, native has our own layout. May import:
records, config, models above this folder, its denoisers and encoders.
"""
