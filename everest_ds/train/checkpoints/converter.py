"""DeepSpeed's converter to universal checkpoints, which reads shards as data: a program that `reshard` starts."""

import multiprocessing

from deepspeed.checkpoint.ds_to_universal import main, parse_arguments

from everest_ds.train.checkpoints.shards import as_data

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")  # its workers read as this process does
    with as_data():
        main(parse_arguments())
