"""``shardkv completion``: the script that makes a shell complete shardkv's commands and options."""

import click

from shardkv.cli.root import Example


@click.command(
    cls=Example,
    example="""
    shardkv completion bash >> ~/.bashrc
    shardkv completion zsh >> ~/.zshrc
    shardkv completion fish > ~/.config/fish/completions/shardkv.fish
    """,
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL."""
    from click.shell_completion import get_completion_class

    from shardkv.cli.root import shardkv

    completer = get_completion_class(shell)
    assert completer is not None, shell
    instance = completer(shardkv, {}, "shardkv", "_SHARDKV_COMPLETE")
    # Not source(): for bash that starts a bash to ask for its version.
    click.echo(instance.source_template % instance.source_vars())
