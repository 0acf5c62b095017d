"""Relations between tokens, head by head: how much each token is like each other one, whatever the width.

    R = softmax(X X^T / sqrt(d))          X [batch, heads, tokens, d]: queries, keys, values or hidden states
    loss = mean over batch, heads and tokens of KL(R^T || R^S)

Source: Wang et al., "MiniLMv2: multi-head self-attention relation distillation", ACL Findings 2021, equations 3 to 6.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import log_softmax


def log_relations(states: Tensor, heads: int) -> Tensor:
    """log R [batch, heads, tokens, tokens] of states [batch, tokens, width]; `heads` divides the width."""
    cut = states.unflatten(-1, (heads, -1)).transpose(1, 2)
    return log_softmax(cut @ cut.transpose(2, 3) / math.sqrt(cut.shape[-1]), dim=-1)


def relation_loss(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """Mean KL of the teacher's relations to the student's, nats; widths may differ."""
    wanted, given = log_relations(teacher, heads), log_relations(student, heads)
    return (wanted.exp() * (wanted - given)).sum(-1).mean()
