"""The reference generator: trained on collected pairs, it writes an adapter for a task from prompts (and a description).

May import: scoring and the rooms below it.
"""
