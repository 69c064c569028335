"""Packed and unpacked agree, padding counts for nothing, and what an engine says it leaves alone it leaves alone."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ernie_dist.batch import IGNORED, Batch, Chance, MicroBatch, Row, empty_micro_batch, stack
from ernie_dist.engine.base import Engine
from ernie_dist.engine.select import build_engine
from ernie_dist.model import attention
from ernie_dist.model.build import build_model
from ernie_dist.model.loss import summed_loss
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.shape import ModelShape
from ernie_dist.spec.training import AdapterSpec, EngineSpec, ModelSpec, OptimizerSpec
from ernie_dist.world import World

VOCABULARY, LENGTH = 96, 24
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
MODEL = ModelSpec(preset="ernie-4.5-tiny", override={**SHAPE, "vocab_size": VOCABULARY})
ROWS = ((7, 1, 12), (24,), (3, 3, 3, 3, 3), (20, 4))
"""lengths of the documents in each packed row; the rest of a row is padding"""
FREEZE = ("model.embed_tokens.*", "model.layers.0.*")

torch.set_num_threads(1)

Document = tuple[np.ndarray, np.ndarray]
"""tokens and shifted labels"""


def documents(seed: int = 0) -> list[list[Document]]:
    """Per row, its documents: about half of the positions have a label, of very short ones none."""
    generator = np.random.default_rng(seed)
    packed = []
    for lengths in ROWS:
        row = []
        for length in lengths:
            tokens = generator.integers(3, VOCABULARY, length)
            labels = np.where(generator.random(length) < 0.5, np.roll(tokens, -1), IGNORED)
            labels[-1] = IGNORED
            row.append((tokens, labels))
        packed.append(row)
    return packed


def pack(rows: list[list[Document]]) -> MicroBatch:
    packed = []
    for row in rows:
        lengths = [len(tokens) for tokens, _ in row]
        rest = LENGTH - sum(lengths)
        padding = [(np.zeros(rest, np.int64), np.full(rest, IGNORED))] if rest else []
        tokens, labels = (np.concatenate(parts) for parts in zip(*row, *padding, strict=True))
        lengths += [rest] if rest else []
        packed.append(Row(tokens, labels, np.concatenate([np.arange(n) for n in lengths]), np.array(lengths)))
    return stack(packed)


def build(attn_implementation: str | None = None, checkpointing: str | int = "none") -> PreTrainedModel:
    chosen = {"attn_implementation": attn_implementation} if attn_implementation else {}
    return build_model(MODEL, VOCABULARY, 17, checkpointing, **chosen)


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    assert all(parameter.grad is not None for parameter in model.parameters())
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def backward(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = summed_loss(model, batch)
    loss.backward()
    return loss.detach(), gradients(model)


def plain_loss(model: PreTrainedModel, tokens: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    """One document as any transformers user would run it: no packing, no code of ours."""
    logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
    return cross_entropy(logits, torch.from_numpy(labels), ignore_index=IGNORED, reduction="sum")


def test_a_pack_has_the_loss_and_gradients_of_its_documents_one_by_one() -> None:
    ours, plain = build(), build(attn_implementation="sdpa")
    loss, packed = backward(ours, pack(documents()))
    losses = [plain_loss(plain, *document) for row in documents() for document in row]
    torch.stack(losses).sum().backward()
    assert loss > 50  # of about 40 labels
    torch.testing.assert_close(loss, torch.stack(losses).sum().detach(), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(plain).items():
        assert gradient.abs().max() > 1e-3, f"{name}: nothing to compare"
        torch.testing.assert_close(
            packed[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(("row", "number"), [(0, 0), (0, 2), (2, 1)])
def test_a_document_never_changes_the_loss_of_another(row: int, number: int) -> None:
    model, before, after = build(), documents(), documents()
    tokens, labels = before[row][number]
    unlabelled = np.full_like(labels, IGNORED)
    before[row][number] = (tokens, unlabelled)
    after[row][number] = ((tokens + 40) % VOCABULARY, unlabelled)
    with torch.no_grad():
        losses = [summed_loss(model, pack(rows)) for rows in (before, after)]
    assert losses[0] == losses[1] > 50


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((8, 0), {"flash_attn_interface", "flash_attn.cute"}, None),
        ((9, 0), {"flash_attn_interface", "flash_attn.cute"}, "FA3"),
        ((9, 0), {"flash_attn.cute"}, "FA4"),
        ((10, 0), {"flash_attn_interface", "flash_attn.cute"}, "FA4"),
        ((10, 3), {"flash_attn_interface"}, None),
        ((9, 0), set(), None),
    ],
)
def test_the_newest_flash_attention_for_a_gpu_is_chosen_with_a_mock_of_torch_s_registry(
    monkeypatch, capability, installed, expected
):
    activated = []
    monkeypatch.setattr(attention, "find_spec", lambda module: module if module in installed else None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    assert attention.activate_newest_flash(capability) == expected
    assert activated == ([expected] if expected else [])


def test_a_newer_flash_attention_that_does_not_load_is_told_and_left_alone(monkeypatch, caplog):
    """By torch's own registry, and a module that has no kernels in it."""
    monkeypatch.setattr(attention, "_NEWER", (("FA3", 9, "json"),))
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert attention.activate_newest_flash((9, 0)) is None
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert "json is installed but cannot be used" in caplog.text


def test_only_labelled_positions_go_through_the_head() -> None:
    model, batch, rows = build(), pack(documents()), []
    model.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(inputs[0].shape))
    summed_loss(model, batch)
    assert rows == [(int((batch.labels_BT != IGNORED).sum()), SHAPE["hidden_size"])]


@pytest.mark.parametrize(("checkpointing", "recomputed"), [("none", 0), ("full", 4), (2, 2), (3, 2)])
def test_recomputed_layers_have_the_same_gradients(checkpointing: str | int, recomputed: int) -> None:
    loss, expected = backward(build().train(), pack(documents()))
    model, runs = build(checkpointing=checkpointing).train(), []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    same, found = backward(model, pack(documents()))
    assert len(runs) == len(model.model.layers) + recomputed
    assert same == loss
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)


# --- the plain engine, the reference of all others ---------------------------------------------------------------


def engine(*freezes: tuple[str, ...], **options: Any) -> Any:
    spec = EngineSpec(kind="plain", precision="fp32", **options)
    make = partial(build_model, MODEL, VOCABULARY, 17, spec.gradient_checkpointing)
    return build_engine(spec, OptimizerSpec(), freezes, make, summed_loss, World())


def batch_of(*micro_batches: MicroBatch) -> Batch:
    return Batch(0, "stage", micro_batches, np.zeros((len(ROWS), 2), np.int64), len(ROWS) * LENGTH)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}


def test_padding_alone_has_no_loss_and_no_gradient() -> None:
    loss, found = backward(build(), empty_micro_batch(LENGTH))
    assert loss == 0 and all(gradient.abs().max() == 0 for gradient in found.values())
    result = engine().step(batch_of(empty_micro_batch(LENGTH)), 1e-3)
    assert (result.loss, result.grad_norm, result.loss_tokens, result.applied) == (0.0, 0.0, 0, True)
    with_padding, without = engine(), engine()
    both = [
        one.step(batch_of(pack(documents()), *more), 1e-2)
        for one, more in ((with_padding, [empty_micro_batch(LENGTH)]), (without, []))
    ]
    assert both[0] == both[1]
    assert with_padding.evaluate([empty_micro_batch(LENGTH)]) == (0.0, 0)


def test_a_batch_is_one_mean_over_its_labels_however_it_is_cut() -> None:
    rows = documents()
    labelled = [sum(int((labels != IGNORED).sum()) for _, labels in row) for row in rows]
    assert len(set(labelled)) > 2, "equal parts would hide a mean of means"
    whole, cut = engine(max_grad_norm=0.5), engine(max_grad_norm=0.5)
    for step in range(3):
        rows = documents(step)
        one = whole.step(batch_of(pack(rows)), 1e-2)
        four = cut.step(batch_of(*(pack([row]) for row in rows)), 1e-2)
        assert four.loss_tokens == one.loss_tokens == sum((u != IGNORED).sum() for row in rows for _, u in row)
        assert (four.loss, four.grad_norm) == pytest.approx((one.loss, one.grad_norm), rel=1e-5)
        assert one.grad_norm > 0.5, "the norm is the one before clipping"
    loss, tokens = whole.evaluate([pack(documents(9))])
    assert cut.evaluate([pack([row]) for row in documents(9)]) == (pytest.approx(loss, rel=1e-4), tokens)


def test_a_step_is_adamw_on_the_mean_loss_with_clipped_gradients() -> None:
    """The same three steps, written out with torch alone."""
    ours, reference = engine(max_grad_norm=0.5), build()
    matrices = [p for p in reference.parameters() if p.dim() >= 2]
    vectors = [p for p in reference.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step, rate in enumerate((1e-3, 1e-2, 5e-3)):
        batch = pack(documents(step))
        result = ours.step(batch_of(batch), rate)
        loss = summed_loss(reference, batch) / (batch.labels_BT != IGNORED).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert (result.loss, result.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-5)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_frozen_weights_keep_every_bit_and_move_again_afterwards() -> None:
    trained = engine(FREEZE, ("model.norm.weight",))
    frozen = {name for name in weights(trained) if name.startswith(("model.embed_tokens.", "model.layers.0."))}
    frozen |= {"lm_head.weight"}  # tied to the embeddings
    moved = []
    # once with the momentum of a step before, which would carry a weight on
    for step, patterns in enumerate(((), FREEZE, FREEZE, ("model.norm.weight",), ())):
        before = weights(trained)
        trained.freeze(patterns)
        trained.step(batch_of(pack(documents(step))), 1e-2)
        moved.append({name for name, tensor in weights(trained).items() if not torch.equal(tensor, before[name])})
    everything = set(weights(trained))
    assert moved == [
        everything,
        everything - frozen,
        everything - frozen,
        everything - {"model.norm.weight"},
        everything,
    ]


def test_the_gradient_of_frozen_weights_is_not_in_the_norm() -> None:
    all_but_one = ("model.embed_tokens.*", "model.layers.*")
    frozen, reference = engine(all_but_one), build()
    frozen.freeze(all_but_one)
    norm = frozen.step(batch_of(pack(documents())), 1e-3).grad_norm
    _, found = backward(reference, pack(documents()))
    labelled = int((pack(documents()).labels_BT != IGNORED).sum())
    assert norm == pytest.approx(found["model.norm.weight"].norm().item() / labelled, rel=1e-5)


def test_a_freeze_pattern_that_matches_nothing_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(SpecError, match=r'"model\.layer\.0\.\*" matches no parameter.*model\.embed_tokens\.weight'):
        engine(("model.layer.0.*",))


# --- what is left to chance ------------------------------------------------------------------------------------------


def test_neftune_noise_is_bounded_by_each_document_and_drawn_from_seeds_alone() -> None:
    model, batch = build(), pack(documents())
    width, alpha = SHAPE["hidden_size"], 5.0
    seen: list[torch.Tensor] = []
    hook = partial(model.model.register_forward_pre_hook, with_kwargs=True)
    hook(lambda module, given, named: seen.append(named.get("inputs_embeds")))
    losses = []
    for seeds in ((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 5), None):
        torch.rand(7)  # whoever else draws does not matter
        losses.append(summed_loss(model, replace(batch, chance=seeds and Chance(seeds, alpha))).item())
    assert losses[0] == losses[1] and len(set(losses)) == 3 and seen[3] is None
    noise = (seen[0] - model.get_input_embeddings()(batch.tokens_BT)).detach()
    torch.testing.assert_close(seen[0][:3], seen[2][:3], rtol=0, atol=0)
    start = 0
    for length in ROWS[0]:
        bound = alpha / math.sqrt(length * width)
        part = noise[0, start : start + length].abs().max().item()
        assert 0.8 * bound < part <= bound * (1 + 1e-5), "the shorter the document, the louder"
        start += length


def test_an_adapter_changes_nothing_at_first_and_then_alone_learns() -> None:
    adapted = partial(build_model, MODEL.model_copy(update={"adapter": AdapterSpec(rank=2)}), VOCABULARY, 17)
    assert summed_loss(adapted(), pack(documents())) == summed_loss(build(), pack(documents()))
    spec = EngineSpec(kind="plain", precision="fp32")
    freeze = ("model.layers.0.*",)
    learning: Any = build_engine(spec, OptimizerSpec(), [freeze], adapted, summed_loss, World())
    for patterns, moving in (((), {"0", "1", "2", "3"}), (freeze, {"1", "2", "3"})):
        learning.freeze(patterns)
        before = weights(learning)
        learning.step(batch_of(pack(documents())), 1e-2)
        changed = {name for name, tensor in weights(learning).items() if not torch.equal(tensor, before[name])}
        assert {name.split(".")[2] for name in changed} == moving
        assert all(".lora_" in name for name in changed)
    shape = ModelShape.from_config(learning.config)
    assert learning.trainable == shape.adapter_parameters(AdapterSpec(rank=2)) < learning.parameters / 10
