"""Weights in and out: files of ours, of VideoMAE and EVEREST, of mmaction2, and of Hugging Face.

facts          what the shapes of tensors do not say
architecture   the model that weights fill, from their shapes and facts
soundness      weights are finite real numbers, or refused
foreign        files and folders of others, read as data
huggingface    its names and configurations, both ways
neighbours     mmaction2's names; other models, refused by what they are
reading        any of them under our names: `read_weights`
report         what was loaded, left fresh, interpolated, ignored
loading        weights into a model that exists: `load_weights`
export         weights in another layout: `write_weights`
hub_config     a Hugging Face folder's config.json and the settings of its processors
hub_folder     all of its files but the weights
card           its model card
hub_code/      what it carries to run without us: `modeling_everest`, `processing_everest`
"""
