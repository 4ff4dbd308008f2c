"""The reference generator: trained on collected pairs, it writes adapters from prompts (and a description).

May import: scoring and the rooms below it.
"""
