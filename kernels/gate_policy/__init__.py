"""The gate's decision on NVIDIA GPUs: two launches from tokens to α, two back.

    s      = [mean of image tokens ‖ mean of text tokens ‖ their cosine]
    input  = [norm of the image mean ‖ norm of the text mean ‖ cosine]
    hidden = W₁ input + b₁;  logit = w₂·GELU(hidden) + b₂;  then a Beta policy step (beta_math.py)

    image_tokens  (B, N, C)       any strides, float32, half types or float64; text_tokens (T, P, C)
    masks         (B, N), (T, P)  bool, True = a token
    weights       (K, 2C + 1), (K), (1, K), (1)   of the state's dtype, float32 or float64
    means         (M + T, C)      of the M images that make a state, in order, and of the texts
    state         (A, 2C + 1)     A decisions; hidden (A, K); alpha, action, log_prob, entropy (A)
    derivatives   (2, A)          of log_prob and entropy by the logit

Forward. ``gate_means_kernel`` averages tokens, a program for 32 channels of one image or text, both
in one launch. ``gate_decide_kernel`` does all the rest, a program for one decision (four where
there are many, so that the weights are read less often): what it works on, one state, fits into
registers, and a hidden layer of 128 units is too small to be worth a launch of its own.

Backward. A decision's gradient needs all of its hidden units, a weight's all decisions, an image's
row only its decision: ``gate_backward_kernel`` goes from gradients of results to those of both
means, a program a decision, and leaves input and hidden gradients behind; then
``gate_spread_kernel`` serves weights and rows in one launch. No atomics: every sum has one order.
"""

from .backward import backward
from .forward import forward

__all__ = ["backward", "forward"]
