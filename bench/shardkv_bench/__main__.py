"""``python -m shardkv_bench``. Its work is in ``command``, which takes a while to load: time to interrupt it."""

from shardkv.program import run_program


def main() -> object:
    from shardkv_bench.command import bench

    return bench.main(prog_name="python -m shardkv_bench", standalone_mode=False)


if __name__ == "__main__":
    run_program(main)
