"""Collections in other tools' formats: a module with `export` each, which FORMAT in common/settings.py names.

May import: analysis and the rooms below it.
"""
