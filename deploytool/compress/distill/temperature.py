"""Knowledge distillation: the student's softened probabilities learn to be the teacher's.

    loss = T^2 KL(softmax(t / T) || softmax(s / T))

with the teacher's logits t, the student's s and the temperature T; T^2 keeps the gradient's size when T changes.
Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, section 2.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), nats; logits [..., classes], mean over the other axes."""
    wanted = log_softmax(teacher / temperature, dim=-1)
    given = log_softmax(student / temperature, dim=-1)
    return temperature**2 * (wanted.exp() * (wanted - given)).sum(dim=-1).mean()


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine along the last axis [..., width], mean over the others."""
    return (1.0 - cosine_similarity(student, teacher, dim=-1)).mean()


def temperature_at(step: int, total: int, start: float, end: float, floor: float) -> float:
    """The temperature of step 0 .. total - 1: on a line from `start` to `end`, but never below `floor`."""
    return max(floor, start + (end - start) * step / max(1, total - 1))
