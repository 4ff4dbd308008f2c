"""The packed engine: many adapters trained together on one frozen base model.

May import: archives and the rooms below it.
"""
