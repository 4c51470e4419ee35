"""Reading frames of a video by index, with one of several libraries behind one small interface.

`base` is the interface, `choice` says which reader is used, and each library has one module. `packets`, `bitstream`
and `oddities` look at a file without decoding it, `proven` says which files decord and torchcodec read rightly, and
`turns` puts pictures the right way up.
"""
