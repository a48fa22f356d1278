"""The admin endpoint: a node seen over HTTP, for people, probes and Prometheus. It shows; it changes nothing.

``app`` answers, ``metrics`` and ``page`` say how that looks, ``serving`` binds and keeps the web server up. The rules:
this package is imported only by a node that was told ``--admin``, so that no other loads a web server; what it shows is
taken from the node's parts when somebody asks, so that no request of a client pays for it; whatever goes wrong here
ends a page, never the node.
"""

from shardkv.server.admin.serving import Admin

__all__ = ["Admin"]
