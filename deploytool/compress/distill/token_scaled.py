"""Token-scaled logit distillation (TSLD): tokens that the teacher finds hard count for more.

    c_t = -log softmax(z^T_t)[y_t]                    the teacher's cross-entropy on the true next token
    w_t = exp(c_t / tau) / sum_u exp(c_u / tau)       over the tokens of one sequence, detached
    L   = sum_batch sum_t w_t (-sum_v softmax(z^T_t)[v] log softmax(z^S_t)[v])

Source: Kim et al., "Token-scaled logit distillation for ternary weight generative language models", NeurIPS 2023; the
sum over the batch is as in the authors' code: the loss grows with the batch.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

IGNORED = -100


def token_weights(teacher: Tensor, labels: Tensor, tau: float) -> Tensor:
    """w_t [batch, tokens] of logits [batch, tokens, vocabulary] and true next tokens; 0 where the label is -100."""
    hard = cross_entropy(teacher.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    hidden = labels == IGNORED
    weights = softmax((hard / tau).masked_fill(hidden, -float("inf")), dim=1)
    return weights.masked_fill(hidden, 0.0).detach()


def token_scaled_loss(student: Tensor, teacher: Tensor, labels: Tensor, tau: float) -> Tensor:
    """L in nats, of logits [batch, tokens, vocabulary] and labels [batch, tokens]."""
    soft = -(softmax(teacher, dim=-1) * log_softmax(student, dim=-1)).sum(-1)
    return (token_weights(teacher, labels, tau) * soft).sum()
