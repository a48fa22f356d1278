"""The command line: click commands, the shell and the demo. Nothing here is imported by a node or a client.

``main`` is the ``shardkv`` script. Commands are loaded when they are named, so that ``shardkv get`` starts without
paying for the node, the shell or the load generator.
"""


def main() -> None:
    try:
        from shardkv.cli.root import main as run
    except KeyboardInterrupt:  # what comes later the command sees to
        raise SystemExit(130) from None
    run()
