"""Reading frames of a video by index, with one of several libraries behind one small interface.

`base` is the interface, `choice` chooses the reader, and each library has one module. `packets`, `bitstream` and
`quirks` inspect a file without decoding it, `supported` says which files decord and torchcodec read correctly, and
`orientation` rotates and mirrors frames. The rest of the project uses `video`.
"""
