"""Datasets: dataset_info.json, their rows, other formats, pictures, and where the prepared files come from.

May import: common, hub, model.
"""
