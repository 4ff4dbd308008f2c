"""A finished run on disk: its manifest, identity, checkpoints, scores, index, and warnings about its quality.

May import: common, hub, model, dataset, recipes.
"""
