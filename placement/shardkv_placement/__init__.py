"""The placement driver: who the nodes are, where the ranges are, and what should move next.

What lives here is its pure half: the replicated state (:mod:`.state`) and the commands that change it
(:mod:`.commands`), what nodes report (:mod:`.heartbeat`, :mod:`.statistics`), an immutable picture of both
(:mod:`.view`), functions from that picture to operators (:mod:`.schedulers`), and the controller that says what to do
about them (:mod:`.controller`). Nothing here does I/O, reads a clock or starts a task: the server hands in bytes and
times and performs what comes back.
"""
