"""How the ops sit in PyTorch: opcheck, compilation, export, meta tensors, autocast, autograd's limits, the backends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import soda_kernels as sk
from soda_kernels._library import AUTO_NAMESPACE, REFERENCE_NAMESPACE
from tests.kernels.op_calls import SCHEDULE, channels_last, op_calls


def op_names(namespace: str) -> set[str]:
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name.split("::")[1] for schema in schemas if schema.name.startswith(f"{namespace}::")}


def test_every_op_is_checked_and_stands_in_both_namespaces() -> None:
    assert op_names(AUTO_NAMESPACE) == op_names(REFERENCE_NAMESPACE) == set(op_calls())


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, calls in op_calls().items() for case, _ in calls], ids=str
)
def test_opcheck(name: str, case: str) -> None:
    arguments = dict(op_calls()[name])[case]
    torch.library.opcheck(getattr(torch.ops.soda_kernels, name).default, arguments)


@pytest.mark.parametrize("name", op_calls())
def test_meta_tensors_beside_others_are_refused(name: str) -> None:
    """Whichever it is: the dispatcher would take the shape function, and hand out memory that nobody wrote."""
    for _, arguments in op_calls()[name]:
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                mixed = (*arguments[:place], argument.to("meta"), *arguments[place + 1 :])
                with pytest.raises(ValueError, match=f"^the tensors of {name} are on cpu and meta; move them to one"):
                    getattr(torch.ops.soda_kernels, name)(*mixed)


def strides_that_count(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, calls in op_calls().items() for case, _ in calls], ids=str
)
def test_meta_tensors_get_true_shapes_dtypes_and_strides(name: str, case: str) -> None:
    arguments = dict(op_calls()[name])[case]
    op = getattr(torch.ops.soda_kernels, name)
    real = tree_leaves(op(*arguments))
    on_meta = tree_map_only(Tensor, lambda t: t.to("meta"), arguments)
    meta = tree_leaves(op(*on_meta))
    assert len(real) == len(meta)
    for a, b in zip(real, meta, strict=True):
        assert b.is_meta
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert strides_that_count(a) == strides_that_count(b)


# The public functions as a user calls them: (name, function of images x [N, 8, 4, 3] and tokens q [N, T, 2, 8])


def norm(x: Tensor) -> Tensor:
    scale = x.mean((2, 3))
    y = sk.modulated_group_norm(x, 4, modulations=[(scale, scale + 1)], dropout_p=0.25, seed=3)
    y, summed = sk.modulated_group_norm(y, 2, residual=x, residual_scale=0.7)
    return sk.modulated_group_norm((y, summed), 4, activation=None)


def attend(x: Tensor) -> Tensor:
    tokens = x.flatten(2).mT.unflatten(2, (2, 4))  # [N, T, H, D]
    mixed = sk.attention_qkvpacked(torch.stack((tokens, 2 * tokens, -tokens), dim=2))
    return sk.attention(mixed, tokens[:, ::2], mixed[:, 1::2])


def noising(x: Tensor) -> Tensor:
    ids = torch.arange(x.shape[0])
    index, steps = ids * 3, ids + 7
    x_t = sk.add_noise(x, index, SCHEDULE, seed=1, sample_ids=ids, step=steps)
    return sk.denoising_loss(x_t, x.detach(), index, SCHEDULE, seed=1, sample_ids=ids, step=steps, target="v")


def drawing(x: Tensor) -> Tensor:
    """Step indices drawn inside and alone, and images in bytes."""
    key = {"seed": 1, "sample_ids": torch.arange(x.shape[0]), "step": 3}
    x_t, index = sk.add_noise(x, None, SCHEDULE, sampling="logit_normal", **key)
    octets = (x.detach() * 50 + 128).to(torch.uint8)
    noisy, same = sk.add_noise(octets, None, SCHEDULE, sampling="logit_normal", dtype=torch.bfloat16, **key)
    index = index + same - sk.draw_step_index(SCHEDULE, sampling="logit_normal", **key)
    return sk.denoising_loss(x_t + noisy.float(), octets, index, SCHEDULE, target="x0", **key)


def sampling(x: Tensor) -> Tensor:
    with torch.no_grad():
        ids = torch.arange(x.shape[0])
        noise = sk.philox_normal(x.shape, seed=1, sample_ids=ids) + sk.philox_uniform(x.shape, seed=1, sample_ids=ids)
        x_next, x0 = sk.sampler_step(x, noise, x, SCHEDULE, 9, 5, method="ddpm", cfg_scale=2.0, seed=1, sample_ids=ids)
        x_next, _ = sk.sampler_step(x_next, noise, x, SCHEDULE, 7, 6, cfg_scale=3.0, guidance_rescale=0.7)
        x_next, _ = sk.sampler_step(
            x_next, noise, None, SCHEDULE, torch.tensor(5), torch.tensor(-1), method="dpmpp_2m", previous_x0=x0,
            previous_index=9,
        )  # fmt: skip
    return x + x_next


FUNCTIONS = [norm, attend, noising, drawing, sampling]
EACH_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y).cumsum(0))[0]


def image_batch(batch: int) -> Tensor:
    return channels_last(batch, 8, 4, 3)


@EACH_FUNCTION
def test_compiles_without_graph_breaks_and_reuses_a_dynamic_graph(function: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in (3, 5, 7, 6):  # static, then one dynamic graph for the rest
        x = image_batch(batch)
        actual, expected = value_and_gradient(compiled, x), value_and_gradient(function, x)
        torch.testing.assert_close(actual, expected)
        assert strides_that_count(actual[0]) == strides_that_count(expected[0])
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    """Whose code asserts the sizes and strides that the fakes promised; one graph, for it takes seconds."""
    torch._dynamo.reset()

    def step(x: Tensor) -> Tensor:
        return noising(norm(x)) + attend(x).mean((1, 2, 3)) + sampling(x).mean((1, 2, 3))

    x = image_batch(3)
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(value_and_gradient(compiled, x), value_and_gradient(step, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_backward_may_bring_a_gradient_in_the_other_layout() -> None:
    torch._dynamo.reset()
    target = torch.randn(3, 8, 6, 5)

    def step(x: Tensor) -> Tensor:
        y = sk.modulated_group_norm(x, 4)
        assert isinstance(y, Tensor)
        return (y.contiguous() * target).sum((1, 2, 3))

    x = channels_last(3, 8, 6, 5)
    compiled = torch.compile(step, fullgraph=True)
    actual, expected = value_and_gradient(compiled, x), value_and_gradient(step, x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual[1].stride() == x.stride()


def test_stratified_draws_compile_without_graph_breaks() -> None:
    """A graph for each size of the batch, of which the strata are the number."""
    torch._dynamo.reset()

    def draw(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return sk.add_noise(
            x, None, SCHEDULE, seed=1, sample_ids=torch.arange(x.shape[0]), step=step, sampling="stratified"
        )  # fmt: skip

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for batch in (3, 5, 7):
        x, step = image_batch(batch), torch.tensor(batch)
        for actual, expected in zip(compiled(x, step), draw(x, step), strict=True):
            assert torch.equal(actual, expected)


def test_seeds_and_indices_that_change_do_not_recompile_for_each_value() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def draw(x: Tensor, seed: Any, index: Any) -> Tensor:
        y = sk.modulated_group_norm(x, 4, dropout_p=0.5, seed=seed)
        return sk.sampler_step(x, y, None, SCHEDULE, index, -1, method="ddpm", seed=seed, sample_ids=range(2))[0]

    def expected(x: Tensor, seed: int, index: int) -> Tensor:
        y = sk.modulated_group_norm(x, 4, dropout_p=0.5, seed=seed)
        return sk.sampler_step(x, y, None, SCHEDULE, index, -1, method="ddpm", seed=seed, sample_ids=range(2))[0]

    x = torch.randn(2, 8, 3)
    for value in (3, 4, 5, 6):
        assert torch.equal(draw(x, torch.tensor(value), torch.tensor(value)), expected(x, value, value))
    assert counter.frame_count == 1
    for value in (3, 4, 5, 6):
        assert torch.equal(draw(x, value, value), expected(x, value, value))
    assert counter.frame_count <= 3


def test_the_backend_is_part_of_what_a_compiled_graph_depends_on() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: sk.modulated_group_norm(x, 4), fullgraph=True, backend=backend)
    x = torch.randn(2, 8, 3)
    compiled(x)
    with sk.use_backend("reference"):
        compiled(x)
    compiled(x)
    assert len(graphs) == 2
    assert [("soda_kernels_reference" in graph.print_readable(print_output=False)) for graph in graphs] == [False, True]


@pytest.mark.parametrize("name", ["eps", "scale_offset", "dropout_p"])
def test_numbers_that_change_compile_without_graph_breaks(name: str) -> None:
    """torch.compile makes symbols of them, as of sizes with dynamic=True."""
    torch._dynamo.reset()

    def norm(x: Tensor, value: float) -> Any:
        return sk.modulated_group_norm(x, 4, seed=3, **{name: value})

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager", dynamic=True)
    for size, value in ((3, 0.1), (5, 0.2), (6, 0.3)):
        x = torch.randn(2, 8, size, requires_grad=True)
        y = compiled(x, value)
        assert torch.equal(y, norm(x, value))
        y.sum().backward()
        assert x.grad is not None


@EACH_FUNCTION
def test_exports(function: Callable[[Tensor], Tensor]) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    batch = torch.export.Dim("batch", min=2, max=16)
    with torch.no_grad():
        program = torch.export.export(Model(), (image_batch(3),), dynamic_shapes=({0: batch},))
        x = image_batch(5)
        torch.testing.assert_close(program.module()(x), function(x))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith("soda_kernels.") for target in targets)


@EACH_FUNCTION
def test_autocast_leaves_the_dtypes_of_arguments_alone(function: Callable[[Tensor], Tensor]) -> None:
    x = image_batch(3)
    expected = value_and_gradient(function, x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradient(function, x)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", [norm, attend, noising, drawing], ids=lambda function: function.__name__)
def test_a_second_derivative_raises(function: Callable[[Tensor], Tensor]) -> None:
    x = image_batch(3).requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(function(x).square().sum(), x)[0])
    penalty = gradient.square().sum() + x.pow(3).sum()  # with a term that has a second derivative of its own
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(penalty, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        penalty.backward()


def test_a_gradient_through_a_sampler_step_raises() -> None:
    x = image_batch(3)
    for name in ("x_t", "cond", "uncond", "previous_x0"):
        images = {key: x.clone() for key in ("x_t", "cond", "uncond", "previous_x0")}
        images[name].requires_grad_()
        keywords = {"schedule": SCHEDULE, "step_index": 5, "next_index": 4, "previous_index": 6, "method": "dpmpp_2m"}
        with pytest.raises(RuntimeError, match="not differentiable"):
            sk.sampler_step(**images, **keywords)
        with torch.no_grad():
            sk.sampler_step(**images, **keywords)


# Backends


@EACH_FUNCTION
def test_the_reference_can_be_asked_for(function: Callable[[Tensor], Tensor]) -> None:
    x = image_batch(3)
    expected = value_and_gradient(function, x)
    with sk.use_backend("reference"):
        explanation = sk.explain(function, x)
        actual = value_and_gradient(function, x)
    assert all((choice.backend, choice.reason) == ("reference", "asked for by use_backend")
               for choice in explanation.choices)  # fmt: skip
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_use_backend_nests_and_is_restored_after_an_error() -> None:
    def reason() -> str:
        return sk.explain(sk.modulated_group_norm, torch.randn(2, 8, 3), 4).choices[0].reason

    outside = reason()
    with sk.use_backend("reference"):
        with sk.use_backend("auto"):
            assert reason() == outside
        assert reason() == "asked for by use_backend"
        with pytest.raises(ZeroDivisionError), sk.use_backend("auto"):
            raise ZeroDivisionError
        assert reason() == "asked for by use_backend"
    assert reason() == outside
    with (
        pytest.raises(ValueError, match=r"backend is 'cuda'; it must be 'auto' or 'reference'"),
        sk.use_backend("cuda"),
    ):  # type: ignore[arg-type]
        pass


def test_a_backward_runs_on_the_backend_of_its_forward() -> None:
    x = image_batch(3).requires_grad_()
    with sk.use_backend("reference"):
        y = sk.modulated_group_norm(x, 4)
    called: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.namespace)
            return func(*args, **(kwargs or {}))

    with Recorder():
        y.sum().backward()
    assert REFERENCE_NAMESPACE in called
    assert AUTO_NAMESPACE not in called


def test_the_backend_holds_in_other_threads() -> None:
    reasons: list[str] = []
    x = torch.randn(2, 8, 3)
    with sk.use_backend("reference"):
        thread = threading.Thread(
            target=lambda: reasons.append(sk.explain(sk.modulated_group_norm, x, 4).choices[0].reason)
        )
        thread.start()
        thread.join()
    assert reasons == ["asked for by use_backend"]


def test_explain_names_each_op_and_computes_nothing() -> None:
    explanation = sk.explain(sampling, image_batch(3))
    assert [choice.op for choice in explanation.choices] == [
        "philox_normal", "philox_uniform", "sampler_step", "sampler_step", "sampler_step"
    ]  # fmt: skip
    assert all(choice.device == "cpu" and choice.reason for choice in explanation.choices)
    assert len(str(explanation).splitlines()) == 5
    assert str(explanation).startswith("philox_normal on cpu: ")
    huge = torch.empty(1, device="meta").expand(2**20, 2**10, 2**10)
    assert sk.explain(sk.modulated_group_norm, huge, 32).choices[0].device == "meta"
    assert str(sk.explain(torch.sin, torch.ones(2))) == "no op of soda_kernels is called"
    with pytest.raises(ValueError, match="num_groups is 3"):
        sk.explain(sk.modulated_group_norm, torch.ones(2, 8), 3)


def test_explain_takes_a_module() -> None:
    module = sk.ModulatedGroupNorm(4, 8)
    (choice,) = sk.explain(module, torch.randn(2, 8, 3, requires_grad=True)).choices
    assert choice.op == "modulated_group_norm"


def test_public_names_all_exist_and_are_documented() -> None:
    for name in sk.__all__:
        assert getattr(sk, name).__doc__
