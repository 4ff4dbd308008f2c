"""Collections in other tools' formats.

May import: analysis and the rooms below it.
"""
