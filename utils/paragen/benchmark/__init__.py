"""The benchmark of a parameter generator: adapters for tasks that it has not seen, beside what is there without it.

May import every other room.
"""
