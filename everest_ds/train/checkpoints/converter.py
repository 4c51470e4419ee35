"""A program that `reshard` starts: DeepSpeed's converter to universal checkpoints, made to read shards as data."""

import multiprocessing

from deepspeed.checkpoint.ds_to_universal import main, parse_arguments

from everest_ds.train.checkpoints.shards import as_data

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")  # so that its workers read shards as data too
    with as_data():
        main(parse_arguments())
