"""The model: tubelets -> importance -> selection -> packed tokens -> transformer -> autoencoder or classifier.

Usable without DeepSpeed, decord or a GPU. Tensor names end in their axes:

    B clips of a batch          C colour channels        T frames          H, W pixels
    N tokens of a clip          S selected tokens of a clip
    L packed visible tokens     R packed target tokens   M any number of tokens
    D width                     E three times D (query, key, value)
    A attention heads           K channels of a head     P pixel values of a tubelet

Masks are not passed around. A token is named by its position in its clip's grid (time-major, then rows, then
columns), and the kept tokens of a batch are a `TokenSet`. Where a boolean mask appears, True means kept.
"""
