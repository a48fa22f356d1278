"""Decisions about the life of ranges on a node, as pure functions and one map.

``split`` plans splits and says what becomes of their right half here, ``spans`` knows which range owns which keys of
this node, ``admission`` says what to do with a message for a replica. Nothing here waits, writes or sends.
"""
