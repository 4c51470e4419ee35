"""Reading frames of a video by index, with one of several libraries behind one small interface.

`base` is the interface, `choice` says which reader serves; there is one module for each library, and it alone
imports that library.
"""
