"""Collections on the Hugging Face hub: the card, licences, the published tree, uploading and pulling.

May import: exports and the rooms below it.
"""
