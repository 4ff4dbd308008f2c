"""Training with LLaMA-Factory and our callbacks: attempts, staging folders, outcomes, the choice of the engine.

May import: collection and the rooms below it.
"""
