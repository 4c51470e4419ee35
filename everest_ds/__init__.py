"""everest_ds: DeepSpeed trainer for EVEREST, masked video autoencoders over the tokens whose content changes."""

__version__ = "0.1.0"
