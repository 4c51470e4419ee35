"""Weights in and out: files of ours, of VideoMAE and EVEREST, of mmaction2, and of Hugging Face.

architecture     the model that weights fill, from their shapes and metadata
foreign          files and folders of others, read as data
huggingface      its names and configurations, both ways
other_projects   mmaction2's names; other models, refused by what they are
reading          any of them under our names, finite and float32: `read_weights`
report           how weights differ from a model, and what was loaded
loading          weights into a model that exists: `load_weights`
export           weights in another layout: `write_weights`
hub_folder       a Hugging Face folder's files besides the weights, with its model card
hub_code/        code in that folder that runs without us
"""
