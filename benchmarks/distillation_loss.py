"""Heads and loss of PASS, forward and backward, without the logits against the published loops and against logits.

Also the matrix products that any exact method does, as bare ``torch.mm`` into memory that is there: what they take is
the least that a method can take whose products are torch.mm's. Ours may take less where oneDNN multiplies faster.

Run from the repository: ``python -m benchmarks.distillation_loss``
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Timing, alternate, times_less_cpu
from benchmarks.measure import Cost, cost, in_own_process
from passreid_ray.losses import (
    become_centered_targets,
    mean_over_pairs,
    part_distillation_loss,
    prototype_cross_entropy,
)
from passreid_ray.models.prototype_head import PrototypeHead, Prototypes, token_names
from tests.reference.literal_pass_loss import literal_heads, literal_pass_loss

WIDTH, PROTOTYPES, GLOBAL, LOCAL, PARTS = 384, 65_536, 2, 3, 3
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
BATCHES, THREADS, REPEATS = (8, 64), (1,), 5
OURS, FLOOR = "without logits", "matrix products alone"

Loss = Callable[[PrototypeHead, PrototypeHead, "Tokens"], Tensor]


class Tokens:
    """What the backbones give: views in the order of ``PassModel``."""

    def __init__(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def rows(*shape: int) -> Tensor:
            return torch.randn(*shape, WIDTH, generator=generator)

        self.batch = batch
        self.teacher = [rows(GLOBAL * batch) for _ in range(1 + PARTS)]
        self.student_global = [rows(GLOBAL * batch).requires_grad_() for _ in range(1 + PARTS)]
        self.student_local = [rows(2, LOCAL * batch).requires_grad_() for _ in range(PARTS)]

    def student(self) -> list[Tensor]:
        """Per token all its views, ``(V_t * B, D)``."""
        cls = torch.cat([self.student_global[0], *(own_2ND[0] for own_2ND in self.student_local)])
        parts = zip(self.student_global[1:], self.student_local, strict=True)
        return [cls, *(torch.cat([own_global, own_2ND[1]]) for own_global, own_2ND in parts)]

    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        return [*self.student_global, *self.student_local]


def heads(num_prototypes: int) -> tuple[PrototypeHead, PrototypeHead]:
    """Student and teacher, different so that there is something to learn."""
    built = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        built.append(PrototypeHead(WIDTH, num_prototypes, num_tokens=1 + PARTS))
    return built[0], built[1]


def loss_without_logits(student: PrototypeHead, teacher: PrototypeHead, tokens: Tokens) -> Tensor:
    """Ours, token by token: only one token's targets exist at a time."""
    losses, num_pairs = [], []
    bottlenecks = [own_ND.unflatten(0, (-1, tokens.batch)) for own_ND in student.bottlenecks(tokens.student())]
    with torch.no_grad():
        of_teacher = [own_ND.unflatten(0, (GLOBAL, -1)) for own_ND in teacher.bottlenecks(tokens.teacher)]
    for token, (own_VBD, teacher_GBD) in enumerate(zip(bottlenecks, of_teacher, strict=True)):
        with torch.no_grad():
            logits_GBK = teacher.prototypes()[token](teacher_GBD)
            targets_GBK = become_centered_targets(
                logits_GBK, logits_GBK.new_zeros(teacher.num_prototypes), TEACHER_TEMP
            )
        own = student.prototypes()[token]
        losses.append(
            prototype_cross_entropy(own_VBD, own.weight_v, own.weight_g, targets_GBK, student_temp=STUDENT_TEMP)
        )
        num_pairs.append((len(own_VBD) - 1) * GLOBAL)
    return mean_over_pairs(torch.stack(losses), num_pairs)


def loss_of_logits(student: PrototypeHead, teacher: PrototypeHead, tokens: Tokens) -> Tensor:
    """``part_distillation_loss`` of all logits at once."""
    with torch.inference_mode():
        teacher_logits = [own_NK.unflatten(0, (GLOBAL, -1)) for own_NK in teacher(tokens.teacher)]
    return part_distillation_loss(
        [own_NK.unflatten(0, (-1, tokens.batch)) for own_NK in student(tokens.student())],
        teacher_logits,
        torch.zeros(1 + PARTS, teacher.num_prototypes),
        student_temp=STUDENT_TEMP,
        teacher_temp=TEACHER_TEMP,
    )


def published_loss(student: PrototypeHead, teacher: PrototypeHead, tokens: Tokens) -> Tensor:
    """The loops: 10 calls of the student's heads, 4 of the teacher's, 44 pairs."""

    def logits_of(head: PrototypeHead) -> Callable[[int, Tensor], Tensor]:
        # Normalised anew at every call, as the hook of a weight-normalised layer does.
        return lambda token, rows_ND: F.linear(features_of(head, token, rows_ND), prototypes_of(head, token))

    with torch.no_grad():
        teacher_logits = [logits_of(teacher)(token, own_ND) for token, own_ND in enumerate(tokens.teacher)]
    student_logits = literal_heads(logits_of(student), tokens.student_global, tokens.student_local)
    centers_TK = torch.zeros(1 + PARTS, teacher.num_prototypes)
    return literal_pass_loss(student_logits, teacher_logits, centers_TK, tokens.batch, STUDENT_TEMP, TEACHER_TEMP)


def matrix_products(batch: int) -> Callable[[], None]:
    """The products of both heads at one batch, forward and backward; a call does all of them."""
    head = PrototypeHead(WIDTH, 1)
    rows_of_student = [len(own_ND) * batch for own_ND in Tokens(1).student()]
    linears = [layer for layer in head.get_submodule("mlp_cls").children() if isinstance(layer, torch.nn.Linear)]
    shapes = [(layer.out_features, layer.in_features) for layer in linears]
    shapes.append((PROTOTYPES, shapes[-1][0]))
    weights = [torch.randn(shape) for shape in shapes]
    d_weights = [torch.empty(shape) for shape in shapes]
    inputs = {rows: [torch.randn(rows, shape[1]) for shape in shapes] for rows in {*rows_of_student, GLOBAL * batch}}
    outputs = {rows: [torch.randn(rows, shape[0]) for shape in shapes] for rows in inputs}

    def forward(rows: int) -> None:
        for input_ND, weight, output_NE in zip(inputs[rows], weights, outputs[rows], strict=True):
            torch.mm(input_ND, weight.T, out=output_NE)

    def backward(rows: int) -> None:
        for input_ND, weight, d_weight, output_NE in zip(inputs[rows], weights, d_weights, outputs[rows], strict=True):
            torch.mm(output_NE.T, input_ND, out=d_weight)
            torch.mm(output_NE, weight, out=input_ND).div_(len(weight))  # keeps numbers finite from call to call

    def products() -> None:
        for rows in rows_of_student:
            forward(GLOBAL * batch)
            forward(rows)
            backward(rows)

    return products


LOSSES: dict[str, Loss] = {
    OURS: loss_without_logits,
    "logits at once": loss_of_logits,
    "published loops": published_loss,
}


def features_of(head: PrototypeHead, token: int, rows_ND: Tensor) -> Tensor:
    """L2-normalised bottleneck of one token."""
    name = token_names(head.num_tokens)[token]
    return F.normalize(head.get_submodule(f"mlp_{name}")(rows_ND), dim=-1)


def prototypes_of(head: PrototypeHead, token: int) -> Tensor:
    """Normalised prototypes of one token, ``(K, D)``."""
    layer = head.get_submodule(f"last_layer_{token_names(head.num_tokens)[token]}")
    assert isinstance(layer, Prototypes)
    # What ``torch.nn.utils.weight_norm`` calls: one kernel.
    return torch._weight_norm(layer.weight_v, layer.weight_g)  # pyright: ignore[reportPrivateImportUsage]


def step(kind: str, student: PrototypeHead, teacher: PrototypeHead, tokens: Tokens) -> Tensor:
    """Loss and gradients; as in training, those of the step before are gone."""
    for leaf in [*student.parameters(), *tokens.leaves()]:
        leaf.grad = None
    loss = LOSSES[kind](student, teacher, tokens)
    loss.backward()
    return loss.detach()


def measured(kind: str, batch: int, threads: int) -> tuple[Cost, float]:
    """Cost of the first step, and the loss; after a step of a small head."""
    torch.set_num_threads(threads)
    step(kind, *heads(64), Tokens(2))
    student, teacher = heads(PROTOTYPES)
    tokens = Tokens(batch)
    first, loss = cost(lambda: step(kind, student, teacher, tokens))
    return first, loss.item()


def timed_in_turns(batch: int, threads: int, bf16: bool, repeats: int = REPEATS) -> dict[str, list[Timing]]:
    """Steps of every kind, and of ``matrix_products`` in float32."""
    torch.set_num_threads(threads)
    student, teacher = heads(PROTOTYPES)
    tokens = Tokens(batch)

    def one_step(kind: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            step(kind, student, teacher, tokens)

    sides: dict[str, Callable[[], object]] = {kind: partial(one_step, kind) for kind in LOSSES}
    if not bf16:
        sides[FLOOR] = matrix_products(batch)
    return alternate(sides, repeats)


def gradients(kind: str, batch: int) -> tuple[float, list[Tensor]]:
    """Loss, and gradients of all parameters and tokens."""
    student, teacher = heads(PROTOTYPES)
    tokens = Tokens(batch)
    loss = step(kind, student, teacher, tokens).item()
    leaves = [*student.parameters(), *tokens.leaves()]
    return loss, [leaf.grad for leaf in leaves if leaf.grad is not None]


def largest_difference(batch: int) -> tuple[float, float]:
    """Relative difference of ours to the published loops: of the loss, and the largest of a gradient's norm."""
    ours, own_gradients = gradients(OURS, batch)
    expected, expected_gradients = gradients("published loops", batch)
    pairs = zip(own_gradients, expected_gradients, strict=True)
    return abs(ours / expected - 1), max(((own - wanted).norm() / wanted.norm()).item() for own, wanted in pairs)


def main(batches: Sequence[int] = BATCHES) -> None:
    """Print whether the gradients are equal, then the costs."""
    loss_difference, gradient_difference = in_own_process(largest_difference, min(batches))
    print(f"relative difference of the loss {loss_difference:.1e}, of the gradients at most {gradient_difference:.1e}")
    if not max(loss_difference, gradient_difference) < 1e-5:
        raise SystemExit("the gradients are not those of the published loops")
    for threads, batch, bf16 in itertools.product(THREADS, batches, (False, True)):
        timings = in_own_process(timed_in_turns, batch, threads, bf16)
        print(f"\nbatch {batch}, {'bf16' if bf16 else 'fp32'}, {threads} threads: ", end="")
        print(f"{GLOBAL} + {PARTS * LOCAL} views, {PROTOTYPES} prototypes; CPU seconds, medians of {REPEATS} in turns")
        for kind, own in timings.items():
            seconds = statistics.median(timing.cpu_seconds for timing in own)
            to_ours = times_less_cpu(own, timings[OURS])
            floor = f", {times_less_cpu(own, timings[FLOOR]).median:.2f} x the products alone" if not bf16 else ""
            print(f"{kind:24s} {seconds:6.3f} s, {to_ours.median:.2f} x ours{floor}")
    for batch in batches:
        costs = {kind: in_own_process(measured, kind, batch, 1) for kind in LOSSES}
        print(f"\nbatch {batch}, fp32, 1 thread, the first step")
        for kind, (first, loss) in costs.items():
            print(f"{kind:24s} {first} ({first.peak_bytes / costs[OURS][0].peak_bytes:.2f} x ours), loss {loss:.6f}")


if __name__ == "__main__":
    main([int(batch) for batch in sys.argv[1:]] or BATCHES)
