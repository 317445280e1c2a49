"""Layers that share an attention map: what must hold on every family, in every phase, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from effc.compiler import graph_json
from effc.compiler.blocks.echo_attention import EchoAttention, LeadAttention
from effc.compiler.blocks.rope import rotate, tables
from effc.compiler.cost import cache_bytes, count
from effc.compiler.isolation import isolation
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.rewrite import Rewriter
from effc.compiler.step import Cache
from effc.passes.distill.hidden import Hidden
from effc.passes.prune.depth import Depth
from effc.passes.quantize.rtn import RTN
from effc.passes.tie._alike import grouped, likeness
from effc.passes.tie.attention import Attention
from effc.runtime.calibrate import calibrate
from effc.runtime.fit import fit
from effc.runtime.generate import generate
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref
from tests.compiler.conftest import FAMILIES, fill

from .tiny_models import Sequences, on_meta, outputs

CODE = Ref("code")
IDS = torch.arange(36).view(3, 12)
GROUPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "llama": ((0, 1, 2),), "qwen3": ((0, 1),), "gemma2": ((0, 2), (1, 3)), "gpt2": ((0, 1),),
    "neox": ((0, 1),), "dynamic": ((0, 1),), "bert": ((0, 1),),
}  # fmt: skip
DECODERS = [name for name in GROUPS if name != "bert"]


def echoed(model: Model, **given: object) -> Model:
    method = Attention.model_validate(given)
    return calibrate(method, model, Context(2, {"data": Sequences(model)})).model


def planted(family: str) -> Model:
    """A model whose followers see what their leaders see, through the same W_q and W_k."""
    model = fill(FAMILIES[family]())
    for leader, *rest in GROUPS[family]:
        for layer in range(leader, rest[-1]):  # nothing between them changes the stream
            for end in ("attention.o", "mlp.down"):
                for name, tensor in model.module(f"layers.{layer}.{end}").named_parameters():
                    model.place(f"layers.{layer}.{end}.{name}", torch.zeros_like(tensor))
        for layer, part in itertools.product(
            rest, ("norm1", "attention.q", "attention.k", "attention.q_norm", "attention.k_norm")
        ):
            if part.count("_") and not hasattr(model.module(f"layers.{leader}.attention"), "q_norm"):
                continue
            for name, tensor in model.module(f"layers.{leader}.{part}").named_parameters():
                model.place(f"layers.{layer}.{part}.{name}", tensor.detach())
    if family == "gemma2":  # norms behind branches would make something of nothing
        assert not any(p.bias is not None for _, p in model.units() if type(p).__name__ == "Norm")
    return model


@pytest.mark.parametrize("maps", ["store", "recompute"])
@pytest.mark.parametrize("family", [name for name in GROUPS if name != "bert"])
def test_where_layers_look_alike_nothing_changes(family: str, maps: str) -> None:
    model = planted(family)
    small = echoed(model, groups=GROUPS[family], maps=maps)
    torch.testing.assert_close(outputs(small, IDS), outputs(model, IDS), rtol=1e-5, atol=1e-5)
    other = fill(FAMILIES[family](), 5)
    apart = outputs(echoed(other, groups=GROUPS[family], maps=maps), IDS) - outputs(other, IDS)
    assert float(apart.abs().max()) > 1e-2, "elsewhere sharing moves the function"


@pytest.mark.parametrize("family", GROUPS)
def test_both_ways_to_hand_on_a_map_give_the_same(family: str) -> None:
    model = fill(FAMILIES[family]())
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, 9:] = 0
    found = []
    for maps in ("store", "recompute"):
        small = echoed(model, groups=GROUPS[family], maps=maps)
        with torch.no_grad():
            found.append((small(IDS), small(IDS, mask)[mask.bool()]))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("maps", ["store", "recompute"])
@pytest.mark.parametrize("family", DECODERS)
def test_ops_and_cache_compute_what_forward_computes(family: str, maps: str) -> None:
    small = echoed(fill(FAMILIES[family]()), groups=GROUPS[family], maps=maps)
    cache, parts, pasts = Cache(12), [], {}
    blocks = {str(n.target) for n in small.gm.graph.nodes if str(n.target).endswith(".attention")}
    seen: dict[str, Tensor] = {}
    for path in blocks:
        small.module(path).register_forward_pre_hook(lambda m, a, path=path: seen.__setitem__(path, a[0]))
    with torch.no_grad():
        whole = small(IDS)
        for start, end in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 12)):
            step = small.step(IDS[:, start:end], None, cache)
            y = small(IDS[:, start:end], step=step)
            cache.filled = start
            again = small.step(IDS[:, start:end], None, cache)
            for path in sorted(blocks):
                block = small.module(path)
                want = block(seen[path], step)
                got, pasts[path] = evaluate(expand(block), block, seen[path], again, pasts.get(path))
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            cache.filled = end
            parts.append(y)
    if family != "dynamic":  # whose past gets other frequencies as a row grows
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", GROUPS)
@pytest.mark.parametrize("maps", ["store", "recompute"])
def test_rows_stay_apart(family: str, maps: str) -> None:
    found = isolation(echoed(fill(FAMILIES[family]()), groups=GROUPS[family], maps=maps))
    assert found.isolated, found.leaks


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_a_follower_costs_what_the_card_says(family: str) -> None:
    model = fill(FAMILIES[family]())
    small = echoed(model, groups=GROUPS[family])
    mean = 3
    want = params = kv = 0
    for _, *rest in GROUPS[family]:
        for layer in rest:
            block = model.module(f"layers.{layer}.attention")
            d, h, heads, keys = block.width, block.head_dim, block.heads, block.kv_heads
            extra = (heads + keys) * h if block.bias else 0
            extra += 2 * h if block.qk_norm else 0
            params += d * h * (heads + keys) + extra
            want += 2 * d * h * (heads + keys) + 2 * mean * heads * h
            kv += keys * h * 4
    before, after = count(model, mean), count(small, mean)
    assert before.params - after.params == params
    assert before.flops_per_token - after.flops_per_token == want
    assert before.kv_bytes_per_token - after.kv_bytes_per_token == kv
    cache = Cache(20)
    small(IDS[:1], step=small.step(IDS[:1], None, cache))
    assert cache.bytes == cache_bytes(small, 20)


def test_saved_trained_packed_and_asked_for_text(tiny: Model) -> None:
    small = echoed(tiny, data=CODE, keep_first=1, keep_last=1, ratio=0.34)
    kinds = [type(small.module(f"layers.{i}.attention")).__name__ for i in range(6)]
    assert kinds.count("EchoAttention") == kinds.count("LeadAttention") == 2
    assert kinds[0] == kinds[5] == "Attention"
    method = Hidden(data=CODE, teacher=Ref("base"), steps=2, batch=2, precision="fp32")
    healed = fit(method, small, Context(1, {"data": Sequences(tiny)}, {"teacher": tiny})).model
    follower = kinds.index("EchoAttention")
    name = f"layers.{follower}.attention.v.weight"
    assert not torch.equal(healed.tensors()[name], small.tensors()[name])
    rw = Rewriter(healed)
    RTN(bits=8).rewrite(rw)
    packed = rw.done()
    back = graph_json.from_json(graph_json.to_json(packed))
    for path, tensor in packed.tensors().items():
        back.place(path, tensor.detach())
    ids = generate(back, IDS[:2, :5], max_new_tokens=4)
    assert torch.equal(ids[:, 5:], outputs(packed, ids[:, :-1]).argmax(-1)[:, 4:])


def test_prompts_of_two_lengths_are_answered_as_alone(tiny: Model) -> None:
    small = echoed(tiny, groups=((1, 2), (3, 4)))
    long, short = IDS[0, :7], IDS[1, :4]
    both = torch.stack((long, torch.cat((torch.zeros(3, dtype=torch.long), short))))
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    out = generate(small, both, mask, max_new_tokens=5)
    assert torch.equal(out[0], generate(small, long[None], max_new_tokens=5)[0])
    assert torch.equal(out[1, 3:], generate(small, short[None], max_new_tokens=5)[0])


def test_the_likeliest_neighbors_share(tiny: Model) -> None:
    """Layer 4 is made to look where layer 3 looks."""
    for end in ("attention.o", "mlp.down"):
        tiny.place(f"layers.3.{end}.weight", 0 * tiny.module(f"layers.3.{end}").weight)
    for part in ("norm1", "attention.q", "attention.k"):
        tiny.place(f"layers.4.{part}.weight", tiny.module(f"layers.3.{part}").weight.detach())
    method = Attention(data=CODE, keep_first=1, keep_last=1, ratio=0.17, rows=16)
    found = calibrate(method, tiny, Context(2, {"data": Sequences(tiny)}))
    assert isinstance(found.model.module("layers.3.attention"), LeadAttention)
    assert isinstance(found.model.module("layers.4.attention"), EchoAttention)
    scores = found.measures["scores"]
    assert scores["layers.3 layers.4"] == pytest.approx(1.0, abs=1e-5)
    assert len(scores) == 6
    whole: dict[int, Tensor] = {}
    with torch.no_grad():
        step = tiny.step(Sequences(tiny).ids)
        x = tiny.module("embedding")(Sequences(tiny).ids, step)
        for layer in range(5):
            block = tiny.module(f"layers.{layer}.attention")
            n = tiny.module(f"layers.{layer}.norm1")(x)
            q, k = (getattr(block, name)(n).view(16, 16, -1, 8).transpose(1, 2) for name in "qk")
            q, k = (rotate(t, *tables(block.rope, 8, step, x.dtype)) for t in (q, k))
            s = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(
                ~torch.ones(16, 16).tril().bool(), -torch.inf
            )
            whole[layer] = s.softmax(-1)
            x = x + block(n, step)
            x = x + tiny.module(f"layers.{layer}.mlp")(tiny.module(f"layers.{layer}.norm2")(x))
    by_hand = likeness({layer: whole[layer] for layer in (1, 2, 3, 4)})
    for (a, b), value in by_hand.items():
        assert scores[f"layers.{a} layers.{b}"] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    values = torch.rand(7, 7, generator=dice)
    chains, span, wanted = [[0, 2, 4, 6], [1, 3, 5]], 2 + seed % 2, 3
    best = -1.0
    for leads in itertools.product(*[range(7)] * 7):  # each layer's leader, itself for none
        ok = all(
            leads[f] == f
            or (f in c and leads[f] in c and 0 < c.index(f) - c.index(leads[f]) < span
                and all(leads[c[i]] == leads[f] for i in range(c.index(leads[f]), c.index(f) + 1)))
            for f, c in ((f, next(c for c in chains if f in c)) for f in range(7))
        )  # fmt: skip
        if ok and sum(leads[f] != f for f in range(7)) == wanted:
            best = max(best, sum(float(values[leads[f], f]) for f in range(7) if leads[f] != f))
    found = grouped(chains, span, wanted, lambda a, b: float(values[a, b]))
    assert found is not None
    assert sum(float(values[g[0], f]) for g in found for f in g[1:]) == pytest.approx(best)
    assert grouped(chains, span, 6, lambda a, b: 1.0) is None


def test_too_little_likeness_ends_the_stage_with_a_setting_that_works(tiny: Model) -> None:
    given = {"data": CODE, "keep_first": 1, "keep_last": 1, "ratio": 0.34}
    with pytest.raises(EffcError) as told:
        echoed(tiny, **given, min_similarity=0.99)
    (why,) = told.value.diagnostics
    assert (why.code, why.about) == ("E333", "min_similarity")
    assert why.help is not None
    least = float(why.help.split("min_similarity = ")[1].split(",")[0])
    echoed(tiny, **given, min_similarity=least)


REFUSED: dict[str, tuple[dict[str, object], str, str]] = {
    "too many": ({"data": CODE, "ratio": 0.5}, "E331", "use a ratio of about 17%"),
    "none": ({"data": CODE, "ratio": 0.05}, "E331", "asks for 0 followers among 6 layers"),
    "all kept": ({"data": CODE, "keep_first": 3, "keep_last": 3}, "E330", "3 first and 3 last ones"),
    "not there": ({"groups": ((1, 6),)}, "E331", "the layers are 0 to 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_with_the_measured_number(name: str, tiny: Model) -> None:
    given, code, words = REFUSED[name]
    (told,) = Attention.model_validate(given).refuses(on_meta(tiny))
    assert told.code == code
    assert words in told.render()


def test_it_refuses_layers_that_cannot_share() -> None:
    windows = fill(FAMILIES["gemma2"]())
    (told,) = Attention(groups=((0, 1),)).refuses(windows)
    assert told.notes == ("they differ in window: 4 and None",)
    assert Attention(data=CODE, keep_first=0, keep_last=0, ratio=0.5).chains(windows) == [[0, 2], [1, 3]]
    shared = echoed(fill(FAMILIES["llama"]()), groups=((0, 1),))
    (told,) = Attention(groups=((1, 2),)).refuses(shared)
    assert "layers.1.attention is EchoAttention" in told.render()
    for given, words in (
        ({}, "sequences to compare maps on are missing"),
        ({"groups": ((2, 1),)}, "no leader with later layers"),
        ({"groups": ((1, 2), (2, 3))}, "names? a layer twice"),
        ({"groups": ((1, 2),), "ratio": 0.3}, "ratio has no say"),
    ):
        with pytest.raises(ValueError, match=words):
            Attention.model_validate(given)


def test_a_leader_stays_while_others_hear_it(tiny: Model) -> None:
    small = echoed(tiny, groups=((1, 2),))
    rw = Rewriter(small)
    with pytest.raises(EffcError, match="lose what it hears"):
        rw.remove_layers([1])
    rw.remove_layers([2])
    assert rw.done().layers == 5
    data = Context(1, {"data": Sequences(tiny)})
    assert calibrate(Depth(data=CODE, keep=5), echoed(tiny, groups=((0, 5),)), data).model.layers == 5
