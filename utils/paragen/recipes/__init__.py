"""A recipe and a rank become one rendered run; which keys and templates a recipe may use; new and checked recipes.

May import: common, hub, model, dataset.
"""
