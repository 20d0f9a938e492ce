"""ids to numbers: the decoder, its kernels, and its folders. Torch only; knows no text."""
