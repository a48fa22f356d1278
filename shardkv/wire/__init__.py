"""Bytes between nodes, and between clients and nodes; sans-IO.

``frames`` cuts a byte stream into frames, ``handshake`` opens a connection, ``commands`` are replicated writes,
``requests`` what clients ask, ``raft_codec`` what Raft groups send each other, ``clock_reading`` what nodes ask each
other about the time. Nothing here waits, routes or decides.
"""
