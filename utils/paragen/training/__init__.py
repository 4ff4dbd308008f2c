"""LLaMA-Factory's trainer with our callbacks; attempts and staging folders; which engine trains a run.

May import: collection and the rooms below it.
"""
