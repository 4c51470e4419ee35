"""Weights in and out: files of ours, of VideoMAE and EVEREST, of mmaction2, and of Hugging Face.

architecture     which model weights belong to, from their shapes and metadata
pickles          checks files of torch.save before they are read
foreign          reads any project's files and folders as data
huggingface      renames to and from Hugging Face's layout
other_projects   renames mmaction2's tensors; refuses other known models by name
reading          any layout -> finite float32 weights under our names: `read_weights`
report           how weights differ from a model, and what was loaded
loading          weights into an existing model: `load_weights`
export           weights into another layout: `write_weights`
hub_folder       the other files of a Hugging Face folder, such as its model card
hub_code/        code for that folder that runs without everest_ds
"""
