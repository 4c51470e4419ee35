"""From a job to a trained run directory: the work of `everest pretrain` and `everest finetune`.

The order matters. Everything that can be refused is refused first, as far as possible before any process joins the
others: a wrong setting costs seconds, ends all ranks alike, and leaves nothing behind.
"""
