"""Adapted layers as operators with analytic gradients: y = x W(α)ᵀ + b, with W(α) = W + α(H̃ W H − W).

The change of the weight is a sum of terms, W(α) − W = Σ_k f_k G_kᵀ X_k, of rank n each:

- a vector û of the input side has X = blockrows(û) and G = (Wû)ᵀ;
- a vector ũ of the output side has X = ũᵀ W H and G = blockrows(ũ).

So there are three forms of the same function:

- weight side: make W(α), then one matrix product;
- low-rank side: y = x Wᵀ + Σ f_k (x X_kᵀ) G_k, cheaper where x has few rows;
- activation side (`displacement`): reflect what goes into a layer and what comes out of it; works over any layer.

`adapted_linear` takes the cheaper of the first two (`single_block`, and `blocks` for several). The factors of a single
block (`factors`) are made by the layer, or for many layers together (`shared`). Nothing is kept for the backward pass
but the layer's input and a few vectors; W(α) is made again there. No gradient of the weight is ever made: it would be
gᵀx, and all that is needed of it are its products with a few vectors.

Axes: N rows of x, i inputs, o outputs, n blocks.

Source: ETHER, arXiv:2405.20271, sections 3.2 to 3.4, differentiated here.
"""

from ether_diffusion.tuner.operators.activation import displacement
from ether_diffusion.tuner.operators.dispatch import adapted_linear, adapted_weight

__all__ = ["adapted_linear", "adapted_weight", "displacement"]
