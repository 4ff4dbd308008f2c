"""Scores of checkpoints on held-out prompts: questions, log-likelihoods, generated answers.

May import: publishing and the rooms below it.
"""
