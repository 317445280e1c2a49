"""Loops that some tokens run: held to a dense reference, to caches, to later tokens and to other rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from effc.compiler import graph_json
from effc.compiler.auxiliary import after_step, answered
from effc.compiler.blocks.attention import attend
from effc.compiler.blocks.depth_attention import DepthAttention
from effc.compiler.blocks.recursion import Enter
from effc.compiler.blocks.rope import rotate, tables
from effc.compiler.cost import cache_bytes, count
from effc.compiler.depth_losses import agreement, enters
from effc.compiler.isolation import isolation
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.rewrite import Rewriter
from effc.compiler.show import show
from effc.compiler.step import Cache, Step
from effc.compiler.tokens import best
from effc.passes.adapt.full import Full
from effc.passes.quantize.rtn import RTN
from effc.passes.tie.mor import MoR
from effc.passes.tie.recursive import Recursive
from effc.runtime.fit import fit
from effc.runtime.generate import generate
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.rewriting import rewrite
from effc.specs.recipe import Ref
from tests.compiler.conftest import FAMILIES, fill

from .tiny_models import Sequences, blank, filled, on_meta, outputs

CODE = Ref("code")
IDS = torch.arange(36).view(3, 12)
DECODERS = ("llama", "qwen3", "gemma2", "gpt2", "mixtral", "neox")
FORMS: dict[str, dict[str, Any]] = {
    "expert": {},
    "expert, first keys": {"kv": "share_first", "act": "tanh"},
    "guessed": {"aux": "router", "head": "mlp"},
    "token": {"router": "token"},
    "token, first keys": {"router": "token", "kv": "share_first", "balance": "bias"},
}


def looped(model: Model, seed: int = 1, loud: bool = True, **given: Any) -> Model:
    """Routers of a size that sends tokens to all depths."""
    gate = {} if given.get("router") == "token" else {"alpha": 0.5}
    method = MoR.model_validate({"recursions": 2, "share": "cycle"} | gate | given)
    made = rewrite(method, model, Context(seed)).model
    for path in enters(made):
        for name, tensor in made.module(path).named_parameters():
            if loud and tensor.dim() > 1:
                made.place(f"{path}.{name}", tensor.detach() * 30)
    return made


def even(family: str) -> Model:
    """Four or two layers, so that a stack runs twice."""
    model = fill(FAMILIES[family]())
    rw = Rewriter(model)
    rw.arrange_layers(list(range(model.layers // 2 * 2)))
    return rw.done()


def dense_attention(block: DepthAttention, x: Tensor, keys_of: Tensor, alive: Tensor, step: Step) -> Tensor:
    """All tokens as queries, keys and values of `keys_of` [B, T, d] where `alive`."""
    held: Any = block
    source: Any = getattr(block, "source", block)
    batch, length = x.shape[:2]
    q = held.q(x).view(batch, length, block.heads, -1)
    k = source.k(keys_of).view(batch, length, block.kv_heads, -1)
    v = source.v(keys_of).view(batch, length, block.kv_heads, -1).transpose(1, 2)
    if block.qk_norm:
        q, k = held.q_norm(q), source.k_norm(k)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    if block.rope is not None:
        q, k = (rotate(t, *tables(block.rope, block.head_dim, step, x.dtype)) for t in (q, k))
    places = torch.arange(length)
    seen = (places <= places[:, None]) & alive[:, None]
    if block.window is not None:
        seen = seen & (places > places[:, None] - block.window)
    seen = seen | ~seen.any(-1, keepdim=True)
    y = attend(q, k, v, seen[:, None], False, block.among().scale, block.cap)
    out: Tensor = held.o(y.transpose(1, 2).flatten(2))
    return out


def reference(model: Model, ids: Tensor, training: bool = False) -> Tensor:
    """The same model, every token through every loop, and masks to undo what should not have run."""
    step = model.step(ids)
    values: dict[Any, Any] = {}
    alive = torch.ones_like(ids, dtype=torch.bool)
    state: dict[str, Any] = {}
    first: dict[int, tuple[Any, Tensor]] = {}
    with torch.no_grad():
        for node in model.gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = step if node.name == "step" else ids
                continue
            if node.op == "output":
                return values[node.args[0]]
            args = [values[a] for a in node.all_input_nodes]
            if node.op == "call_function":
                values[node] = args[0] + args[1]
                continue
            block: Any = model.module(str(node.target))
            kind, x = type(block).__name__, args[0]
            if kind == "Enter":
                state["h"] = x
                if block.loop == 0:
                    state |= {"h0": x, "sum": torch.zeros_like(x)}
                    alive = torch.ones_like(alive)
                if block.route == "token":
                    if block.loop == 0:
                        logits = block.logits(x)
                        p = logits.softmax(-1)
                        score = logits if block.bias is None else logits + block.bias
                        state |= {"depth": score.argmax(-1), "p": p}
                    alive = state["depth"] >= block.loop
                else:
                    logit = block.logits(x)[..., 0]
                    state["logit"] = logit
                    seen = block.guess(x)[..., 0] if block.guesses else logit
                    if block.share < 1 and training:
                        whole = torch.ones_like(alive)
                        alive = best(logit, alive, block.share, whole)
                    elif block.share < 1:
                        alive = alive & (seen > 0)
                values[node] = x
            elif kind == "Leave":
                h, on = state["h"], alive[..., None]
                if block.router == "expert":
                    logit = state["logit"]
                    g = block.alpha * (logit.tanh() if block.act == "tanh" else logit.sigmoid())
                    values[node] = torch.where(on, h + g[..., None] * x, h)
                else:
                    ends = (state["depth"] == block.loop)[..., None]
                    weight = state["p"].gather(-1, state["depth"][..., None])
                    state["sum"] = state["sum"] + torch.where(ends, weight * x, 0)
                    last = block.loop + 1 == block.loops
                    values[node] = state["h0"] + state["sum"] if last else torch.where(on, x, h)
            elif kind == "DepthAttention":
                if block.kv == "tell":
                    first[block.slot] = block, x
                if block.kv == "hear":
                    object.__setattr__(block, "source", first[block.slot][0])
                    every = torch.ones_like(alive)
                    values[node] = dense_attention(block, x, first[block.slot][1], every, step)
                else:
                    values[node] = dense_attention(block, x, x, alive, step)
            else:
                values[node] = block(*args)
    raise AssertionError("no output")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", DECODERS)
def test_tokens_that_run_compute_what_a_dense_reference_computes(family: str, form: str) -> None:
    model = looped(even(family), **FORMS[form])
    step = model.step(IDS)
    with torch.no_grad():
        got = model(IDS, step=step)
    ran = step.sides["alive 1"]
    assert 0 < int(ran.sum()) < ran.numel(), "some tokens run the second loop, some do not"
    assert len({int(n) for n in ran.sum(1)}) > 1, "rows differ in how many"
    torch.testing.assert_close(got, reference(model, IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["expert", "expert, first keys", "guessed"])
def test_training_takes_the_best_tokens_of_each_row(form: str) -> None:
    model = looped(filled(blank()), recursions=3, **FORMS[form])
    for unit in enters(model).values():
        unit.train()
    step = model.step(IDS)
    with torch.no_grad():
        got = model(IDS, step=step)
    assert [step.sides[f"alive {loop}"].sum(1).tolist() for loop in range(3)] == [[12] * 3, [8] * 3, [4] * 3]
    assert not bool((step.sides["alive 2"] & ~step.sides["alive 1"]).any())
    torch.testing.assert_close(got, reference(model, IDS, training=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_ops_and_caches_compute_what_forward_computes(family: str, form: str) -> None:
    model = looped(even(family), **FORMS[form])
    blocks = [str(n.target) for n in model.gm.graph.nodes if n.op == "call_module"]
    seen: dict[str, Tensor] = {}
    for path in blocks:
        model.module(path).register_forward_pre_hook(lambda m, a, path=path: seen.__setitem__(path, a[0]))
    cache, pasts, parts = Cache(12), {}, []
    with torch.no_grad():
        whole = model(IDS)
        for start, end in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 12)):
            step = model.step(IDS[:, start:end], None, cache)
            parts.append(model(IDS[:, start:end], step=step))
            cache.filled = start
            again = model.step(IDS[:, start:end], None, cache)
            fresh = Cache(12)
            alone = model.step(IDS[:, start:end], None, fresh)
            fresh.filled = start
            for path in blocks:
                block = model.module(path)
                if isinstance(block, DepthAttention | Enter) or type(block).__name__ == "Leave":
                    got, pasts[path] = evaluate(expand(block), block, seen[path], again, pasts.get(path))
                    if not isinstance(block, DepthAttention):
                        want = block(seen[path], alone)
                        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            cache.filled = end
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_attention_in_ops_behind_a_past_is_the_one_behind_a_cache(form: str) -> None:
    model = looped(filled(blank()), **FORMS[form])
    cache, pasts = Cache(12), {}
    paths = [p for p, unit in model.units() if isinstance(unit, DepthAttention)]
    ins: dict[str, Tensor] = {}
    outs: dict[str, Tensor] = {}
    for path in paths:
        model.module(path).register_forward_pre_hook(lambda m, a, path=path: ins.__setitem__(path, a[0]))
        model.module(path).register_forward_hook(lambda m, a, y, path=path: outs.__setitem__(path, y))
    with torch.no_grad():
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 12)):
            step = model.step(IDS[:, start:end], None, cache)
            model(IDS[:, start:end], step=step)
            cache.filled = start  # as it was while the blocks ran
            for path in paths:
                block = model.module(path)
                got, pasts[path] = evaluate(expand(block), block, ins[path], step, pasts.get(path))
                torch.testing.assert_close(got, outs[path], rtol=1e-5, atol=1e-6)
            cache.filled = end


@pytest.mark.parametrize("form", FORMS)
def test_what_comes_later_changes_nothing(form: str) -> None:
    model = looped(filled(blank()), recursions=3, **FORMS[form])
    other = IDS.clone()
    other[:, 7:] = (other[:, 7:] * 5 + 3) % 48
    torch.testing.assert_close(outputs(model, other)[:, :7], outputs(model, IDS)[:, :7], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs(model, IDS[:, :7]), outputs(model, IDS)[:, :7], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_padding_on_either_side_changes_nothing(form: str) -> None:
    model = looped(filled(blank()), recursions=3, **FORMS[form])
    for training in (False, True):
        for unit in enters(model).values():
            unit.train(training)
        whole = outputs(model, IDS[:, :8])
        for left in (True, False):
            pad = torch.zeros(3, 4, dtype=torch.long)
            ids = torch.cat((pad, IDS[:, :8]) if left else (IDS[:, :8], pad), 1)
            mask = torch.cat((pad, pad + 1, pad + 1) if left else (pad + 1, pad + 1, pad), 1)
            with torch.no_grad():
                got = model(ids, mask)[mask.bool()].view_as(whole)
            torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)


def test_packed_documents_do_not_see_each_other() -> None:
    model = looped(filled(blank()), **FORMS["expert"])
    segments = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        step = model.step(IDS[:1], None, None, None, segments)
        both = model(IDS[:1], step=step)
    torch.testing.assert_close(both[:, :5], outputs(model, IDS[:1, :5]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[:, 5:], outputs(model, IDS[:1, 5:]), rtol=1e-4, atol=1e-5)


def test_tokens_that_do_not_run_keep_their_bits() -> None:
    model = looped(filled(blank()), recursions=3)
    ends: dict[str, Tensor] = {}
    for path, unit in model.units():
        if type(unit).__name__ == "Leave":
            unit.register_forward_hook(lambda m, a, y, path=path: ends.__setitem__(path, y))
    step = model.step(IDS)
    outputs_ = model(IDS, step=step)
    assert outputs_.shape == (3, 12, 48)
    for loop, path in enumerate(ends):
        still = ~step.sides[f"alive {loop}"]
        assert torch.equal(ends[path][still], step.sides[f"bypass {loop}"][still])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_rows_stay_apart(family: str, form: str) -> None:
    model = looped(even(family), **FORMS[form])
    found = isolation(model)
    assert found.isolated, found.leaks
    assert len(found.phases) == 4
    other = IDS.clone()
    other[1] = (other[1] * 7 + 1) % 48
    mine, theirs = outputs(model, IDS), outputs(model, other)
    torch.testing.assert_close(mine[[0, 2]], theirs[[0, 2]], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mine[1], theirs[1], atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_rows_at_different_depths_generate_as_alone(form: str) -> None:
    model = looped(filled(blank()), recursions=3, **FORMS[form])
    long, short = IDS[0, :7], IDS[1, :4]
    both = torch.stack((long, torch.cat((torch.zeros(3, dtype=torch.long), short))))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    out = generate(model, both, mask, max_new_tokens=8)
    assert torch.equal(out[0], generate(model, long[None], max_new_tokens=8)[0])
    assert torch.equal(out[1, 3:], generate(model, short[None], max_new_tokens=8)[0])
    whole = outputs(model, out[:1, :-1])[:, 6:].argmax(-1)
    assert torch.equal(out[:1, 7:], whole)


def test_a_row_that_stops_early_costs_no_products() -> None:
    model = looped(filled(blank()), recursions=2)
    rows: list[int] = []
    model.module("layers.3.mlp").register_forward_pre_hook(lambda m, a: rows.append(a[0].shape[1]))
    generate(model, IDS, max_new_tokens=6)
    assert rows[0] < 3 * 12
    assert set(rows[1:]) & {0, 1, 2}, "steps run the rows that go on, and no others"
    assert all(n <= 3 for n in rows[1:])


@pytest.mark.parametrize("kv", ["per_recursion", "share_first"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_costs_are_those_of_the_formula_and_of_a_counter(family: str, kv: str) -> None:
    model = even(family)
    tied = rewrite(Recursive(loops=2, tie_norms=True), model, Context(1)).model
    small = looped(model, kv=kv)
    width = model.module("embedding").width
    block = tied.module("layers.0.attention")
    spared = 2 * block.kv_heads * block.head_dim if block.bias and kv == "share_first" else 0
    spared *= tied.layers // 2  # biases stay each layer's own when layers share
    assert count(small).params == count(tied).params + 2 * width - spared, "a router of d numbers a loop"
    entry, half = 2 * block.kv_heads * block.head_dim * 4 + 4, tied.layers // 2
    own = kv == "per_recursion"
    assert count(small).kv_bytes_per_token == half * entry + (half * entry // 2 if own else 0)
    mean = 4
    stack = sum(u.flops(mean) for p, u in tied.units() if p.startswith("layers."))
    attended = 4 * mean * block.heads * block.head_dim * tied.layers
    products = stack - attended
    if not own:  # the second loop projects neither keys nor values
        products -= tied.layers // 2 * 2 * 2 * width * block.kv_heads * block.head_dim
        projected = products / 2 + tied.layers // 2 * 2 * width * block.kv_heads * block.head_dim
        want = projected + (products - projected) / 2
    else:
        want = 0.75 * products
    want += attended / 2 + attended / 2 * (0.25 if own else 0.5) + 2 * 2 * width
    outside_ = count(tied, mean).flops_per_token - stack
    assert count(small, mean).flops_per_token - outside_ == pytest.approx(want, rel=1e-6)
    for unit in enters(small).values():
        unit.train()
    length = 12
    whole = torch_flops(tied, length) - head_flops(tied, length)
    scores = 4.0 * 3 * block.heads * block.head_dim * length**2 * tied.layers
    mine = torch_flops(small, length) - head_flops(tied, length) - 2 * 2 * width * 3 * length
    if own and family != "qwen3":  # of one key head torch counts masked attention otherwise
        due = 0.75 * (whole - scores) + scores * (1 + 0.25) / 2
        assert abs(mine / due - 1) < 0.02
    assert mine < whole


def torch_flops(model: Model, length: int) -> float:
    """What torch counts of a pass over three rows."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IDS[:, :length])
    return float(counter.get_total_flops())


def head_flops(model: Model, length: int) -> float:
    return 2.0 * 3 * length * model.module("head").weight.numel()


def test_the_cache_has_the_predicted_bytes_at_capacity() -> None:
    """Every second token runs the second loop, as its capacity says."""
    model = looped(filled(blank()), loud=False)
    path = "layers.3.enter.router.weight"
    router = model.module("layers.3.enter")
    router.logits = lambda x: (
        torch.where(torch.arange(x.shape[1]) % 2 == 0, 1.0, -1.0).view(1, -1, 1).expand(*x.shape[:2], 1)
    )
    assert path in model.tensors()
    cache = Cache(20)
    with torch.no_grad():
        model(IDS[:1], step=model.step(IDS[:1], None, cache))
    assert cache.bytes == cache_bytes(model, 20)
    assert cache_bytes(model, 20) == 3 * 20 * (2 * 16 * 4 + 4) * 3 // 2 + 6 * 8


def train(model: Model, steps: int = 4, **given: Any) -> Model:
    method = Full(data=CODE, steps=steps, batch=4, precision="fp32", optimizer=AdamW(lr=1e-3), **given)
    return fit(method, model, Context(1, {"data": Sequences(model)})).model


@pytest.mark.parametrize("form", FORMS)
def test_training_moves_routers_and_keeps_one_storage(form: str, tiny: Model) -> None:
    model = looped(tiny, recursions=3, z=1e-3, **FORMS[form])
    batch = Sequences(tiny).batch("train", range(3))
    _, more = answered(model, batch)
    wanted = {"expert": {"router", "z"}, "token": {"z"} | ({"balance"} if form == "token" else set())}
    assert set(more) == wanted[form.split(",")[0].replace("guessed", "expert")]
    trained = train(model)
    assert trained.ties() == model.ties()
    up = [trained.module(f"layers.{i}.mlp.up").weight for i in (0, 2, 4)]
    assert all(weight is up[0] for weight in up)
    for path in enters(trained):
        for name, tensor in trained.module(path).named_parameters():
            assert not torch.equal(tensor, model.module(path).get_parameter(name)), f"{path}.{name} moves"
    assert not torch.equal(up[0], model.module("layers.0.mlp.up").weight)


def test_gradients_reach_shared_weights_from_every_loop(tiny: Model) -> None:
    model = looped(tiny)
    weight = model.module("layers.0.mlp.up").weight.requires_grad_()
    model(IDS).square().sum().backward()
    assert weight.grad is not None
    apart = model.clone()
    parts = []
    for layer in (0, 3):
        unit = apart.module(f"layers.{layer}.mlp.up")
        unit.weight = torch.nn.Parameter(weight.detach().clone())
        parts.append(unit.weight)
    apart(IDS).square().sum().backward()
    assert float(parts[1].grad.norm()) > 0
    assert torch.allclose(weight.grad, parts[0].grad + parts[1].grad, rtol=1e-3, atol=1e-4)


def test_a_bias_evens_depths_out(tiny: Model) -> None:
    model = looped(tiny, recursions=2, router="token", balance="bias", balance_weight=0.05)
    path, unit = next(iter(enters(model).items()))
    weights = {f"{path}.bias": torch.nn.Parameter(torch.tensor([0.8, 0.0]))}
    batch = Sequences(tiny).batch("train", range(16))
    for _ in range(40):
        model.place(f"{path}.bias", weights[f"{path}.bias"].detach().clone())
        with torch.no_grad():
            answered(model, batch)
        after_step(model, weights, 0.5)
    depth = batch.step.sides["depth"].float().mean()
    assert abs(float(depth) - 0.5) < 0.1
    assert unit.load is None


def test_the_router_learns_to_choose_without_the_future(tiny: Model) -> None:
    for aux in ("loss", "router"):
        model = looped(tiny, loud=False, aux=aux, aux_weight=1.0)
        ids = Sequences(tiny).ids
        before = agreement(model, ids)
        method = Full(data=CODE, steps=100, batch=8, precision="fp32", optimizer=AdamW(lr=3e-3))
        after = agreement(fit(method, model, Context(1, {"data": Sequences(tiny, 800)})).model, ids)
        assert after > max(0.7, before), f"{aux}: {before:.2f} -> {after:.2f}"


def test_saved_and_packed_models_load_equal(tiny: Model) -> None:
    model = looped(tiny, recursions=3)
    rw = Rewriter(model)
    RTN(bits=8).rewrite(rw)
    packed = rw.done()
    back = graph_json.from_json(graph_json.to_json(packed))
    for path, tensor in packed.tensors().items():
        back.place(path, tensor.detach())
    assert torch.equal(outputs(back, IDS), outputs(packed, IDS))
    assert len({id(packed.module(f"layers.{i}.mlp.up").packed) for i in (0, 2, 4)}) == 1


def test_a_model_that_shares_already_only_gets_routers(tiny: Model) -> None:
    tied = rewrite(Recursive(loops=2, share="middle_cycle", lora_rank=2), tiny, Context(1)).model
    method = MoR(recursions=2)
    assert not method.refuses(tied)
    made = rewrite(method, tied, Context(1)).model
    assert count(made).params == count(tied).params + 2 * 32
    (told,) = MoR(recursions=2, kv="share_first").refuses(tied)
    assert "layers.1.attention.k has a low-rank difference" in told.render()
    (told,) = MoR(recursions=2, share="cycle").refuses(tied)
    assert told.code == "E341"


def test_it_shows_as_the_figure_does(tiny: Model) -> None:
    lines = show(looped(tiny, recursions=2, share="middle_cycle")).splitlines()
    said = "\n".join(lines)
    assert "loop 1 of 2, 100% of tokens" in said
    assert "loop 2 of 2, 50% of tokens" in said
    inside = [line for line in lines if line.startswith(("layers.1.mlp ", "layers.5.mlp "))]
    assert ["[1, N, 32]" in line for line in inside] == [True, False]
    kinds = [line.split()[1] for line in lines[1:-1] if len(line.split()) > 1]
    assert kinds.count("Enter") == kinds.count("Leave") == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "loops": ({"recursions": 3}, "use recursions in {2, 4}"),
    "depth": ({"recursions": 4, "share": "cycle"}, "use recursions in {2, 3, 6}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_with_what_works(name: str, tiny: Model) -> None:
    given, words = REFUSED[name]
    (told,) = MoR.model_validate(given).refuses(on_meta(tiny))
    assert (told.code, told.about) == ("E331", "recursions")
    assert words in told.render()


def test_it_refuses_what_contradicts_itself() -> None:
    for given, words in (
        ({"capacity": (0.5, 1.0), "recursions": 2}, "must fall from loop to loop"),
        ({"capacity": (1.0, 0.0), "recursions": 2}, "above 0"),
        ({"capacity": (1.0,), "recursions": 2}, "1 shares for 2 recursions"),
        ({"capacity": (0.9, 0.5), "recursions": 2, "kv": "share_first"}, "first capacity must be 100%"),
        ({"router": "token", "alpha": 0.2}, "alpha has no say"),
        ({"balance": "bias"}, "balance has no say with router = expert"),
    ):
        with pytest.raises(ValueError, match=words):
            MoR.model_validate(given)
    (told,) = MoR(recursions=2, share="cycle").refuses(fill(FAMILIES["bert"]()))
    assert "one that sees what comes" in told.render()
