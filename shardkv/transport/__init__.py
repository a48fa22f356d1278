"""Connections between nodes and from clients: buffer-shaped, so that a request costs no task and a turn one flush."""
