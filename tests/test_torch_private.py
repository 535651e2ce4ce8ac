"""torch's private names do what the engine expects."""

from __future__ import annotations

import torch

from satchel.runtime import torch_private as t


def test_graph_task_and_node():
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    seen = []
    y.grad_fn.register_prehook(lambda g: seen.append((t.graph_task(), t.current_node() is y.grad_fn, t.keeps_graph())))
    assert t.graph_task() == -1
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert seen[0][0] != seen[1][0] and [s[1:] for s in seen] == [(True, True), (True, False)]


def test_only_root():
    def asked(run):
        x = torch.ones(3, requires_grad=True)
        y = x * 2
        total, other, seen = y.sum(), (3 * x).sum(), {}
        for name, node in {"total": total.grad_fn, "y": y.grad_fn}.items():
            node.register_prehook(lambda _, name=name: seen.update({name: t.is_only_root()}))
        run(total, other, x)
        return seen

    alone, below = {"total": True, "y": False}, {"total": False, "y": False}
    for threads in (True, False):
        with torch.autograd.set_multithreading_enabled(threads):
            assert asked(lambda total, other, x: total.backward()) == alone
            assert asked(lambda total, other, x: torch.autograd.grad(total, [x])) == alone
            assert asked(lambda total, other, x: (total / 4).backward()) == below
            assert asked(lambda total, other, x: torch.autograd.backward([total, other])) == below
            assert asked(lambda total, other, x: torch.autograd.backward([other, total])) == below
            assert torch._C._is_multithreading_enabled() is threads


def test_end_of_backward():
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    seen = []
    y.register_hook(lambda g: t.at_end_of_backward(lambda: seen.append(x.grad is not None)))
    y.sum().backward()
    assert seen == [True]


def test_will_run():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)

    def asked(run):
        y = a * b
        seen = []
        y.register_hook(lambda g: seen.append(tuple(t.will_run(t.accumulator(leaf)) for leaf in (a, b))))
        run(y.sum())
        return seen[0]

    assert asked(lambda y: y.backward()) == (True, True)
    assert asked(lambda y: y.backward(inputs=[a])) == (True, False)
    assert asked(lambda y: torch.autograd.grad(y, b)) == (False, True)


def test_nodes():
    x = torch.ones(3, 2, requires_grad=True)
    (node,) = {(x * 1).unbind(1)[0].grad_fn}
    assert [o[0] for o in t.node_outputs(node)] == [(3,), (3,)] and t.node_outputs(node)[0][1] == x.dtype
    assert t.is_accumulator(t.accumulator(x)) and t.leaf_of(t.accumulator(x)) is x and t.leaf_of(node) is None
    t.metadata(node)["k"] = 1
    assert node.metadata == {"k": 1} and not t.is_python_function(node) and t.reentrant_checkpoint({node}) is None


def test_tensors():
    x = torch.ones(3, 2)
    v = t.version(x)
    x.mul_(2)
    assert t.version(x) == v + 1 and t.view_base(x) is None and t.view_base(x.view(6)) is x
    with torch.inference_mode():
        assert t.version(torch.ones(2)) == 0


def test_surroundings():
    assert not t.inside_functorch() and not t.inside_checkpoint()
    seen = []
    torch.vmap(lambda x: (seen.append(t.inside_functorch()), x)[1])(torch.ones(2))
    from torch.utils.checkpoint import checkpoint

    checkpoint(
        lambda x: (seen.append(t.inside_checkpoint()), x * 2)[1], torch.ones(2, requires_grad=True), use_reentrant=False
    )
    y = checkpoint(lambda x: x * 2, torch.ones(2, requires_grad=True), use_reentrant=True)
    assert seen[:2] == [True, True] and t.reentrant_checkpoint({y.grad_fn}) and t.is_python_function(y.grad_fn)
    with torch.autograd.graph.save_on_cpu():
        assert not t.inside_checkpoint()


def test_saved():
    x, w = torch.ones(3, 2, requires_grad=True), torch.ones(2, 4, requires_grad=True)
    node = (x @ w).grad_fn
    assert node.name() == "MmBackward0" and t.saved(node, "self") is x and t.saved(node, "nothing") is None
    node = torch.addmm(torch.ones(4), x, w).grad_fn
    assert node.name() == "AddmmBackward0" and t.saved(node, "mat1") is x
    assert t.saved(node, "alpha") == t.saved(node, "beta") == 1
    assert t.saved(torch.add(x, x, alpha=2).grad_fn, "alpha") == 2


def test_views():
    x = torch.arange(6.0, requires_grad=True).view(2, 3)
    views = [
        x.t(),
        x.transpose(0, 1),
        x.permute(1, 0),
        x[0],
        x[:, 1:],
        x.unbind(1)[1],
        x.split(2, 1)[0],
        x.chunk(3, 1)[1],
    ]
    views += [x.unsqueeze(0), x.view(3, 2), x.unsafe_split(1, 1)[2], x.split([1, 2], 1)[1], x.view(2, 1, 3).squeeze(1)]
    for view in views:
        assert view.grad_fn.name() in t.VIEWS
    for other in (x * 2, x.clone(), x.exp(), x.sum(0), x.flip(0), x.expand(2, 2, 3), x[[0]]):
        assert other.grad_fn.name() not in t.VIEWS


def test_statistics_and_sparse_gradients():
    from torch.nn import functional as F

    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    mean, var = torch.zeros(3), torch.ones(3)
    assert t.normalised_shape(F.batch_norm(x, None, None, training=True).grad_fn) == (4, 3)
    assert t.normalised_shape(F.batch_norm(x, mean, var).grad_fn) is None
    assert t.normalised_shape(F.layer_norm(x, (3,)).grad_fn) is None
    for sparse in (True, False):
        node = F.embedding(torch.tensor([1]), w, sparse=sparse).grad_fn
        assert t.has_sparse_gradient(node) == sparse


def test_switch_backend():
    before = torch._C._get_mkldnn_enabled()
    was = t.switch_backend("mkldnn", False)
    assert was is before and torch._C._get_mkldnn_enabled() is False
    t.switch_backend("mkldnn", before)
    assert torch._C._get_mkldnn_enabled() is before
    before = torch._C._get_cudnn_enabled()
    assert t.switch_backend("cudnn", before) is before


def test_product():
    a, b = torch.randn(4, 3), torch.randn(5, 3)
    assert t.has_product(a, b) and not t.has_product(a, b.double())
    torch.testing.assert_close(t.product(a, b), a @ b.mT)
    torch.testing.assert_close(t.product(a[:1, ::2], b[:1, ::2]), a[:1, ::2] @ b[:1, ::2].mT)
    a.requires_grad_()
    assert not t.has_product(a, b)
    with torch.no_grad():
        assert t.has_product(a, b)
