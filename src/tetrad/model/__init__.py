"""From ids to numbers: the decoder, its kernels, and its folders. Torch only; no text."""
