"""What a step must never cost: all logits at once, a device that waits for the host, memory that grows, a layer in
pieces. Counted at torch's own door, on the steps that training takes."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ernie_dist.batch import IGNORED, Batch, Chance, MicroBatch, Pairs, Row, stack
from ernie_dist.engine.select import build_engine
from ernie_dist.model import head
from ernie_dist.model.attention import Documents
from ernie_dist.model.build import build_model
from ernie_dist.model.head import LossHead
from ernie_dist.model.loss import summed_loss
from ernie_dist.spec.errors import SpecError
from ernie_dist.spec.training import EngineSpec, ModelSpec, OptimizerSpec
from ernie_dist.world import World

VOCABULARY, LENGTH, CHUNK = 640, 32, 8
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
MODEL = ModelSpec(preset="ernie-4.5-tiny", override={**SHAPE, "vocab_size": VOCABULARY})
WIDE = (4, LENGTH, SHAPE["intermediate_size"])
HOST_READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal")
"""after each of these a host knows what a device has computed, and has waited for it"""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_LOGITS, "cpu", CHUNK * VOCABULARY)


class Seen(TorchDispatchMode):
    """Every operation, and the largest fp32 tensor that any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        self.operations[str(operation.overloadpacket)] += 1
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float32:
                self.largest = max(self.largest, one.numel())
        return made

    @property
    def host_reads(self) -> int:
        return sum(self.operations[name] for name in HOST_READS)


def rows(seed: int, count: int = 4, documents: int = 2) -> MicroBatch:
    """Every position but the last of a document has a label."""
    chance, packed = np.random.default_rng(seed), []
    for _ in range(count):
        cuts = np.sort(chance.choice(np.arange(2, LENGTH - 2), documents - 1, replace=False))
        lengths = np.diff([0, *cuts, LENGTH])
        tokens = chance.integers(3, VOCABULARY, LENGTH)
        labels = np.roll(tokens, -1)
        labels[np.cumsum(lengths) - 1] = IGNORED
        packed.append(Row(tokens, labels, np.concatenate([np.arange(n) for n in lengths]), lengths))
    return stack(packed)


def pairs(seed: int) -> MicroBatch:
    chosen = torch.arange(0, 8, 2)
    return replace(rows(seed), pairs=Pairs(chosen, np.zeros((4, 2), np.int64), torch.zeros(4), beta=0.1))


def batch_of(*micro_batches: MicroBatch) -> Batch:
    return Batch(0, "stage", micro_batches, np.zeros((1, 2), np.int64), LENGTH)


def engine(**options: Any) -> Any:
    spec = EngineSpec(kind="plain", precision="fp32", **options)
    return build_engine(spec, OptimizerSpec(), [], partial(build_model, MODEL, VOCABULARY, 17), summed_loss, World())


@pytest.mark.parametrize("make", [rows, pairs])
def test_no_step_ever_holds_the_logits_of_all_positions(make: Any) -> None:
    trained, batch = engine(), batch_of(make(0), make(1))
    trained.step(batch, 1e-3)
    with Seen() as seen:
        trained.step(batch, 1e-3)
        trained.evaluate([make(2)])
    labelled, weights = len(batch.micro_batches[0].labelled_N), VOCABULARY * SHAPE["hidden_size"]
    assert seen.largest == max(CHUNK * VOCABULARY, weights) < labelled * VOCABULARY / 2


@pytest.mark.parametrize("make", [rows, pairs])
def test_a_micro_batch_is_never_waited_for(make: Any) -> None:
    """Loss and norm of a step are read, once; how many micro-batches it has does not matter."""
    reads = {}
    for micro_batches in (1, 4):
        chance = Chance((1, 2, 3, 4), neftune_alpha=5.0)
        trained, batch = engine(), batch_of(*(replace(make(seed), chance=chance) for seed in range(micro_batches)))
        trained.step(batch, 1e-3)
        with Seen() as seen:
            trained.step(batch, 1e-3)
        reads[micro_batches] = seen.host_reads
    assert reads[1] == reads[4] <= 4


def test_memory_does_not_grow_over_two_hundred_steps() -> None:
    trained, batches = engine(), [batch_of(rows(seed), rows(seed + 1)) for seed in range(5)]

    def held() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return sum(type(one) in (torch.Tensor, torch.nn.Parameter) for one in objects), len(objects)

    for step in range(20):
        trained.step(batches[step % 5], 1e-3)
    before = held()
    for step in range(200):
        trained.step(batches[step % 5], 1e-3)
    after = held()
    assert after[0] == before[0]
    assert after[1] - before[1] < 200, "less than one Python object for each step"


@pytest.mark.parametrize("make", [rows, pairs])
def test_a_deterministic_step_uses_no_operation_that_torch_refuses_as_far_as_a_cpu_knows(make: Any) -> None:
    asked, batch = engine(deterministic=True), batch_of(replace(make(0), chance=Chance((1, 2, 3, 4), 5.0)), make(1))
    assert torch.are_deterministic_algorithms_enabled()
    found = asked.step(batch, 1e-3)
    expected = engine().step(batch, 1e-3)
    assert not torch.are_deterministic_algorithms_enabled(), "a job that does not ask for it does not pay for it"
    assert found == expected and found.applied


# --- the head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("labelled", "bias"), [(3 * CHUNK + 1, False), (CHUNK, True), (1, False), (0, False)])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_and_gradients_of_chunks_are_those_of_all_logits(
    dtype: torch.dtype, labelled: int, bias: bool, each: bool, compiled: bool
) -> None:
    with counted("aot_eager") if compiled else nullcontext():
        check_against_all_logits(dtype, labelled, bias, each, compiled)


def check_against_all_logits(dtype: torch.dtype, labelled: int, bias: bool, each: bool, compiled: bool) -> None:
    chance = torch.Generator().manual_seed(3)
    made = LossHead(SHAPE["hidden_size"], VOCABULARY, bias=bias).to(dtype)
    if compiled:
        made.compile_loss()
    hidden = torch.randn(labelled, SHAPE["hidden_size"], generator=chance).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (labelled,), generator=chance)
    weighed = torch.rand(labelled, generator=chance) if each else torch.tensor(0.25)
    inputs = [hidden, *made.parameters()]

    wide = [one.detach().float().requires_grad_() for one in inputs]
    losses = cross_entropy(linear(*wide), labels, reduction="none" if each else "sum")
    expected = torch.autograd.grad((losses * weighed).sum(), wide)
    found = made(hidden, labels, each=each)
    gradients = torch.autograd.grad((found * weighed).sum(), inputs)

    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses, **near)
    for one, other in zip(gradients, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, **near)
    with torch.no_grad():
        torch.testing.assert_close(made(hidden, labels, each=each), found, rtol=1e-6, atol=1e-6)


def test_the_loss_in_one_kernel_is_the_loss_whatever_the_number_of_rows() -> None:
    """By torch's own compiler, for a CPU: one graph with gradients and one without, however many rows there are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for labelled in (3 * CHUNK + 2, 2 * CHUNK, 5):
        check_against_all_logits(torch.bfloat16, labelled, bias=False, each=False, compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_frozen_weights_of_the_head_get_no_gradient_and_take_no_memory_for_one() -> None:
    made = LossHead(SHAPE["hidden_size"], VOCABULARY, bias=False).requires_grad_(False)
    hidden = torch.randn(2 * CHUNK, SHAPE["hidden_size"]).requires_grad_()
    with Seen() as seen:
        made(hidden, torch.arange(2 * CHUNK)).backward()
    assert hidden.grad is not None and made.weight.grad is None
    assert "aten.addmm_" not in seen.operations


# --- compiled layers ---------------------------------------------------------------------------------------------


@contextmanager
def counted(backend: str) -> Iterator[CompileCounterWithBackend]:
    """What is handed to a compiler goes to one that counts, and compiles less."""
    counter, compiles = CompileCounterWithBackend(backend), torch.compile
    torch._dynamo.reset()

    def counting(function: Any, *, options: Any, **given: Any) -> Any:
        return compiles(function, backend=counter, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", counting)
        yield counter
    torch._dynamo.reset()


def backward(model: PreTrainedModel, batch: MicroBatch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = summed_loss(model, batch)
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_an_mlp_in_tiles_has_the_same_gradients_and_keeps_one_tile(checkpointing: str) -> None:
    plain, tiled = (build_model(MODEL, VOCABULARY, 17, checkpointing, mlp_tiles=tiles).train() for tiles in (1, 4))
    (expected, theirs), (loss, gradients) = (backward(model, rows(0)) for model in (plain, tiled))
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5)

    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.shape) or one, lambda one: one):
        summed_loss(plain, rows(0))
        before, kept[:] = kept.count(WIDE), []
        summed_loss(tiled, rows(0))
    assert (before > 0) == (checkpointing == "none") and kept.count(WIDE) == 0


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_layer_is_compiled_whole_and_once_whatever_documents_it_gets(checkpointing: str) -> None:
    batches = [rows(seed, documents=documents) for seed, documents in enumerate((2, 3, 5, 8))]
    plain = build_model(MODEL, VOCABULARY, 17).train()
    with counted("aot_eager") as counter:
        model = build_model(MODEL, VOCABULARY, 17, checkpointing, compiled=True).train()
        for batch in batches:
            (loss, gradients), (expected, theirs) = backward(model, batch), backward(plain, batch)
            assert loss == pytest.approx(expected, rel=1e-6)
            for name, gradient in theirs.items():
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 2, "one graph for all layers, one for the loss: a break would make more, or fail"


def test_with_variable_length_attention_too_as_far_as_shapes_show_without_a_gpu() -> None:
    with counted("aot_eager") as counter, FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(MODEL, VOCABULARY, 17, compiled=True)
        layer = model.model.layers[0]
        for documents in (3, 5, 9):
            hidden = torch.empty(2, LENGTH, SHAPE["hidden_size"], requires_grad=True)
            angles = torch.empty(2, LENGTH, SHAPE["head_dim"])
            ends, longest = torch.empty(documents, dtype=torch.int32), torch.empty(documents + 4, 0)
            for changing in (ends, longest):
                torch._dynamo.maybe_mark_dynamic(changing, 0)
            out = layer(hidden, position_embeddings=(angles, angles), documents=Documents(ends, longest, None))
            out.sum().backward()
            assert hidden.grad is not None and hidden.grad.shape == hidden.shape
        assert counter.frame_count == 1


def test_layers_with_experts_are_not_compiled_in_pieces() -> None:
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    spec = ModelSpec(preset="ernie-4.5-21b-a3b", override={**SHAPE, **experts, "vocab_size": VOCABULARY})
    with pytest.raises(SpecError, match=r"engine\.compile: layers with experts"):
        build_model(spec, VOCABULARY, 17, compiled=True)
