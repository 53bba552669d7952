"""The programs of :mod:`emulus.kernels.gpu`, in Triton. Needs Triton; nothing else imports this.

Every sum is taken in an order that the layer's sizes fix: neither the number of tokens, nor which tokens stand beside
a token, nor which program ends first changes it.

Source: Tillet et al. 2019, "Triton: an intermediate language and compiler for tiled neural network computations".
"""
