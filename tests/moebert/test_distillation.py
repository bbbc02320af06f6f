"""The parts of the distillation loss by hand."""

import copy

import pytest
import tiny
import torch

from d2dmoe_pl.moebert.distillation import hidden_state_loss, share_fixed_


def test_hidden_states_of_real_tokens_only():
    student = (torch.zeros(2, 2, 3), torch.ones(2, 2, 3))
    teacher = (torch.full((2, 2, 3), 2.0), torch.ones(2, 2, 3))
    teacher[1][0, 1] = 4.0  # squared error 9 at one of four positions
    assert hidden_state_loss(student, teacher, None).item() == pytest.approx(4 + 9 / 4)
    assert hidden_state_loss(student, teacher, torch.tensor([0, 2])).item() == pytest.approx(4)
    assert hidden_state_loss(student, teacher, torch.tensor([0, 1, 2])).item() == pytest.approx(4 + 9 / 3)


def test_what_does_not_train_is_shared():
    student = tiny.dense("bert")
    teacher = copy.deepcopy(student)
    student.bert.embeddings.requires_grad_(False)
    before = tiny.logits(teacher, inputs := tiny.batch("bert"))
    share_fixed_(teacher, student)
    own = dict(student.named_parameters()) | dict(student.named_buffers())
    for name, tensor in (dict(teacher.named_parameters()) | dict(teacher.named_buffers())).items():
        assert (tensor.data_ptr() == own[name].data_ptr()) == (".embeddings." in name), name
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.equal(tiny.logits(teacher, inputs), before)
