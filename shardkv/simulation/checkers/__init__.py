"""What must hold of a run, whatever happened in it: checkers that are handed what clients saw or what nodes hold.

Nothing here drives a cluster or breaks one. A checker imports the standard library and the nouns of ``shardkv.types``
and ``shardkv.errors`` only, so that it cannot share a mistake with what it judges.
"""
