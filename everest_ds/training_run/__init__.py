"""The work of `everest pretrain` and `everest finetune`: from a job to a trained run directory.

The order matters. All checks come first, if possible before the process group is formed. So a wrong setting costs
seconds, ends all ranks with the same error, and leaves no files behind.
"""
