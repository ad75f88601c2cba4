"""How gradients of each sample and tail fits are computed: torch alone, no idea of the papers.

A batch goes through these files in this order::

    parts           what is asked for, a column for every one of the `groups` of slices; a few images at a time
    strategies      which way: one recorded pass, one image at a time, vmap, a loop; and what the way before it left
      recorder      watches the forward pass; every call of a layer becomes
        calls       a LayerCall, or one that is deferred until it is known who asks for its output:
        folding     a BatchNorm, which is then computed within the convolution
        hearing     which keeps its output where that is asked for
        constants   what depends on no image: standardized weights, tables of positions
      locating      where the batch is in each call's input: two more forward passes, once for each course
      recorder      runs the backward pass, in which each call is reduced by
        kernels     weight gradients of each sample, summed over rows
    verification    one image alone by plain autograd, once for each network and kind of input
"""
