"""Weights in and out: files of ours, of VideoMAE and EVEREST, and of Hugging Face.

facts          what the shapes of tensors do not say
architecture   the model that weights fill, from their shapes and facts
foreign        files and folders of others, read as data
huggingface    its names and configurations, both ways
reading        any of them under our names: `read_weights`
report         what was loaded, left fresh, interpolated, ignored
loading        weights into a model that exists: `load_weights`
export         weights in another layout: `write_weights`
"""
