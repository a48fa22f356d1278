"""``python -m shardkv.cli``: the same as the ``shardkv`` script."""

from shardkv.cli import main

main()
