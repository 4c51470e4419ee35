"""Importers: a public dataset's own layout and split files -> train, val and test lists, for `everest index`.

Each dataset has a module with the dataclass of its options and a function ``collect``, which reads file names and
annotations but no videos.
"""
