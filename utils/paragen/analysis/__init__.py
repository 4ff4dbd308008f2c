"""Statistics of collections, the canonical form of an adapter, and the report page.

May import: packed and the rooms below it.
"""
