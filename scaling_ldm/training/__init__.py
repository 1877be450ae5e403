"""Training on devices: mesh, objective, step, optimizer, checkpoints, progress.

`inference` draws pictures with trained weights, `encoding` runs frozen networks over
pictures: both place arrays on the mesh as training does. May import: config, records,
the numerics, data.
"""
