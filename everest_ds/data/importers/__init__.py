"""Importers: a public dataset's own layout and split files -> train, val and test lists, for `everest index`.

One module a dataset; each has the dataclass of its options and a ``collect`` that looks at names, never at videos.
"""
