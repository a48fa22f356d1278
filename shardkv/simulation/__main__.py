"""``python -m shardkv.simulation``. Its work is in ``command``, which takes a while to load: time to interrupt it."""

from shardkv.program import run_program


def main() -> object:
    from shardkv.simulation.command import simulation

    return simulation.main(prog_name="python -m shardkv.simulation", standalone_mode=False)


if __name__ == "__main__":
    run_program(main)
