"""The lossless small form of a collection: writing, reading any step, restoring.

May import: training and the rooms below it.
"""
