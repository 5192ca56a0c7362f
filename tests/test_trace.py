"""symmetry_of: what theory gives is found, and what is found is right."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from parameter_symmetries import (
    LINEAR,
    RESCALING,
    Axis,
    Group,
    act_on,
    check_symmetry,
    outputs,
    random_elements,
    symmetry_of,
    teleport_,
)
from parameter_symmetries.check import relative_change
from parameter_symmetries.groups import floating
from random_modules import RandomModule
from traced_modules import GPT, Functional, all_cases, linear

CASES = {case.name: case for case in all_cases()}


def units(symmetry):
    return sum(group.count * group.size for group in symmetry)


def blocks(symmetry):
    found = {}
    for group in symmetry:
        if group.kind == LINEAR:
            found[group.size] = found.get(group.size, 0) + group.count
    return found


def axes(symmetry):
    return {(axis.name, axis.dim) for group in symmetry for axis in group.axes}


def change_by_one_side(model, symmetry, sign, inputs):
    """Return how far the outputs change where the axes of one sign move alone."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    side = [g._replace(axes=[a for a in g.axes if a.power * sign > 0]) for g in symmetry]
    elements = random_elements(symmetry, 0.5, torch.Generator().manual_seed(0))
    runs = [outputs(model, p, *inputs) for p in (parameters, act_on(parameters, side, elements))]
    return relative_change(floating(runs[1]), floating(runs[0]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_finds_what_theory_gives_and_that_alone(case):
    symmetry = symmetry_of(case.module, *case.inputs)
    assert (units(symmetry), blocks(symmetry)) == (case.units, case.blocks), symmetry
    if symmetry:
        for inputs in (case.inputs, case.others):
            assert check_symmetry(case.module, symmetry, *inputs) < 1e-10
        for sign in (1, -1):
            assert change_by_one_side(case.module, symmetry, sign, case.others) > 1e-3


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.units], ids=lambda c: c.name)
def test_a_teleport_by_what_it_finds_raises_the_gradient(case):
    symmetry = symmetry_of(case.module, *case.inputs)
    case.module.zero_grad()
    loss = sum(out.square().mean() for out in floating(case.module(*case.inputs)))
    loss.backward()
    before, after = teleport_(case.module, symmetry)
    assert after > before


@pytest.mark.parametrize("linear", [True, False], ids=["sums", "all operations"])
@pytest.mark.parametrize("seeds", [range(k, k + 50) for k in range(0, 200, 50)], ids=str)
def test_an_answer_is_never_wrong(seeds, linear):
    found = 0
    for seed in seeds:
        model = RandomModule(seed, linear)
        inputs, others = torch.randn(2, 3, 4, 6, dtype=torch.float64)
        symmetry = symmetry_of(model, inputs)
        if symmetry:
            check_symmetry(model, symmetry, others[:2])
            found += 1
    assert found > len(seeds) / 5  # or else the test says nothing


# Traps: each module has fewer symmetries than it seems, or more


def two_layers(between, i=8, hidden=12, o=4):
    return Functional(lambda m, x: m.l1(between(m.l0(x))), **linear(i, hidden, o))


def rolled_heads(m, x):
    """Two heads, whose entries move by one: the first of each belongs to the other head's row."""
    y = torch.stack([m.l0(x), m.l0(x).roll(1, 0)], 1).flatten(1)
    return m.l1(y.roll(1, 1)) + m.l2(y)


def written_by_an_unseen_kernel(x):
    out = torch.empty_like(x)
    ctypes.memmove(out.data_ptr(), x.tanh().data_ptr(), x.nbytes)
    return F.relu(x) + out


def written_into_zeros(write):
    def between(x):
        zeros = torch.zeros_like(x)
        write(zeros)
        return F.relu(x) + zeros

    return between


def written_by_batch_norm(x):
    mean = torch.zeros(x.shape[1])
    F.batch_norm(torch.randn(5, 12), mean, torch.ones(12), training=True)
    return F.relu(x + mean)


def normalised_by_names(x):
    mean = F.relu(x).mean(0)
    fixed = torch.ones(5, 12)
    return F.relu(x) + F.batch_norm(fixed, mean, torch.ones(12), None, None, False)


def transposed_in_place(x):
    view = x.view(-1)
    x.t_()
    return F.relu(x).t() + 0 * view.sum()


def compared_into(x):
    mask = torch.empty(0, dtype=torch.bool)
    torch.gt(x, 1, out=mask)
    return x * mask


def numpy_sees(x):
    return F.relu(x) + float(x.numpy().max() > 1)


WITHOUT = {
    "what Python reads": lambda x: F.relu(x) * (1 + x.max().item()),
    "what NumPy reads": numpy_sees,
    "tolist": lambda x: F.relu(x) + sum(x.flatten().tolist()),
    ".data": lambda x: F.relu(x) + x.data.square(),
    "a comparison with 1": lambda x: F.relu(x) * (x > 1),
    "clamp(max=6)": lambda x: x.clamp(0, 6),
    "ReLU6": F.relu6,
    "a count of entries": lambda x: F.relu(x) + torch.linalg.vector_norm(x, 0, -1, keepdim=True),
    "the sorted order against a constant": lambda x: F.relu(x).clamp(max=x.new_tensor(1.0)),
    "a residual of another power": lambda x: F.relu(x) + F.relu(x).square(),
    "bits": lambda x: F.relu(x) + x.view(torch.int32).bool(),
    "an unseen kernel": written_by_an_unseen_kernel,
    "what NumPy writes": written_into_zeros(lambda z: z.numpy().fill(1.0)),
    "a list that is written": written_into_zeros(lambda z: torch._foreach_add_([z], 1.0)),
    "a view without a rule": written_into_zeros(lambda z: z.as_strided((12,), (1,)).add_(1)),
    "running statistics, written": written_by_batch_norm,
    "running statistics, read": normalised_by_names,
    "what lies in empty memory": lambda x: F.relu(x) + torch.empty_like(x),
    "complex numbers": lambda x: torch.view_as_real(x * torch.full((12,), 1j)).sum(-1).relu(),
    "a sparse product": lambda x: F.relu(torch.sparse.mm(torch.eye(len(x)).to_sparse(), x)),
    "a view of what is transposed in place": transposed_in_place,
    "a comparison into a tensor": compared_into,
}


@pytest.mark.parametrize("between", WITHOUT.values(), ids=WITHOUT)
def test_what_bends_units_or_leaves_torch_has_no_symmetry(between):
    assert symmetry_of(two_layers(between), torch.randn(5, 8)) == []


KEPT = {
    "sign": lambda x: F.relu(x) * x.sign(),
    "a comparison with 0": lambda x: x * (x > 0),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "a root and its square": lambda x: F.relu(x).sqrt().square(),
    "in place, through a view": lambda x: (x.view(-1).relu_(), x)[1],
    "written into zeros": lambda x: torch.zeros_like(x).copy_(F.relu(x)),
    "put into an empty tensor": lambda x: torch.empty_like(x).index_copy_(
        0, torch.arange(len(x)), F.relu(x)
    ),
    "masked": lambda x: F.relu(x).masked_fill(x > 1e9 * x, 0.0),
    "a sum from Python": lambda x: sum([F.relu(x), x]),
    "dropout on a GPU": lambda x: torch.native_dropout(F.relu(x), 0.5, True)[0].relu(),
    "an empty tensor with zeros": lambda x: F.relu(x) + torch.empty_like(x).zero_(),
    "half precision in between": lambda x: F.relu(x.bfloat16()).to(x.dtype),
    "padding that is cut again": lambda x: F.pad(F.relu(x), (1, 1))[:, 1:-1],
    "a module that was compiled": lambda x: torch.compile(F.relu, backend="eager")(x),
}


@pytest.mark.parametrize("between", KEPT.values(), ids=KEPT)
def test_what_lets_scales_through_keeps_each_unit(between):
    model = two_layers(between)
    symmetry = symmetry_of(model, torch.randn(5, 8))
    assert units(symmetry) == 12 and blocks(symmetry) == {}
    assert check_symmetry(model, symmetry, torch.randn(9, 8)) < 1e-2


def test_a_layer_may_have_one_unit():
    model = nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 2))
    symmetry = symmetry_of(model, torch.randn(5, 8))
    assert units(symmetry) == 6 and check_symmetry(model, symmetry, torch.randn(9, 8)) < 1e-10


def test_two_units_may_scale_one_entry():
    def read_twice(m, x):
        y = m.l0(x)
        return m.l1(y), (y * m.scale) @ y.roll(1, -1).mT  # by c_i and by c_{i+1}

    layers = linear(8, 3, 4) | {"scale": nn.Parameter(torch.rand(3))}
    model = Functional(read_twice, **layers)
    symmetry = symmetry_of(model, torch.randn(5, 8))
    assert units(symmetry) == 3 and check_symmetry(model, symmetry, torch.randn(9, 8)) < 1e-10


def test_rows_that_are_mixed_up_are_not_offered_as_heads():
    layers = linear(8, 4) | {"l1": nn.Linear(8, 3), "l2": nn.Linear(8, 3)}
    model = Functional(rolled_heads, **layers)
    symmetry = symmetry_of(model, torch.randn(5, 8))
    if symmetry:
        assert check_symmetry(model, symmetry, torch.randn(9, 8)) < 1e-10


class GroupedQueries(nn.Module):
    """Attention whose four queries share two keys and values."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 3)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 3)).permute(2, 0, 3, 1, 4)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


def test_queries_that_share_a_key_move_with_it():
    model, others = GroupedQueries(), torch.randn(2, 9, 8)
    symmetry = symmetry_of(model, torch.randn(2, 5, 8))
    assert blocks(symmetry) == {3: 4}
    assert check_symmetry(model, symmetry, others) < 1e-10


def test_a_decoder_attends_to_an_encoder():
    model = nn.Transformer(16, 4, 1, 1, 32, 0.0, batch_first=True)
    inputs = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    symmetry = symmetry_of(model, *inputs)
    assert blocks(symmetry) == {4: 24}  # three attentions with four heads, each twice
    assert check_symmetry(model, symmetry, torch.randn(2, 7, 16), torch.randn(2, 3, 16)) < 1e-10


def test_positions_and_rows_that_did_not_run_stay_where_they_are():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position = nn.Embedding(50, 8), nn.Parameter(torch.randn(20, 8))
            self.out = nn.Linear(8, 4)

        def forward(self, tokens):
            x = self.token(tokens) + self.position[: tokens.shape[1]]
            return self.out(F.relu(x))

    model = Model()
    symmetry = symmetry_of(model, torch.tensor([[1, 2, 3]]))
    assert units(symmetry) == 8
    assert check_symmetry(model, symmetry, torch.randint(50, (4, 20))) < 1e-10


def test_experts_of_one_parameter_that_no_sample_took_have_no_group():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 6))
            self.down = nn.Parameter(torch.randn(3, 6, 4))

        def forward(self, x, expert):
            return F.relu(x @ self.up[expert]) @ self.down[expert]

    model, x = Model(), torch.randn(5, 8)
    assert symmetry_of(model, x, 1) == []
    both = Functional(lambda m, x: torch.stack([m.net(x, k) for k in range(3)]), net=model)
    symmetry = symmetry_of(both, x)
    assert units(symmetry) == 18 and check_symmetry(both, symmetry, torch.randn(9, 8)) < 1e-10


def test_weights_that_are_tied_or_normalised_have_fewer_groups():
    model = GPT()
    assert "wte.weight" not in {name for name, _ in axes(symmetry_of(model, torch.arange(6)[None]))}
    layers = linear(8, 12, 4)
    parametrizations.spectral_norm(layers["l0"])
    model = Functional(lambda m, x: m.l1(F.relu(m.l0(x))), **layers)
    assert symmetry_of(model, torch.randn(5, 8)) == []
    model = two_layers(F.relu, 8, 8, 8)
    model.l1.weight.data = model.l0.weight.data  # the same memory, which autograd does not know
    assert symmetry_of(model, torch.randn(5, 8)) == []
    model = two_layers(F.relu)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector, model.parameters())  # one memory, side by side
    assert units(symmetry_of(model, torch.randn(5, 8))) == 12


def test_a_weight_that_is_used_twice_has_one_scale():
    model = Functional(lambda m, x: m.l1(F.relu(m.l0(F.relu(m.l0(x))))), **linear(8, 8, 4))
    assert symmetry_of(model, torch.randn(5, 8)) == []


def test_a_cache_among_the_outputs_fixes_keys_and_values():
    def attend(m, x):
        q, k, v = (layer(x) for layer in (m.l0, m.l1, m.l2))
        return {"logits": m.out(F.scaled_dot_product_attention(q, k, v)), "cache": (k, v)}

    layers = {f"l{k}": nn.Linear(8, 8) for k in range(3)} | {"out": nn.Linear(8, 3)}
    model, x = Functional(attend, **layers), torch.randn(2, 5, 8)
    assert symmetry_of(model, x) == []
    symmetry = symmetry_of(model, x, keep=lambda out: out["logits"])
    assert blocks(symmetry) == {8: 2}
    assert check_symmetry(model, symmetry, x, keep=lambda out: out["logits"]) < 1e-10


def test_what_is_kept_may_be_computed_from_the_outputs_and_must_be_there():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = nn.Parameter(torch.eye(8))
    residual = Functional(lambda m, x: m.net[0](x) + m.net(x), net=model)
    symmetry = symmetry_of(residual, torch.arange(5), keep=lambda out: out.softmax(-1))
    assert symmetry == []
    hidden = Functional(lambda m, x: SimpleNamespace(out=m.net(x)), net=model)
    with pytest.raises(ValueError, match="keep="):
        symmetry_of(hidden, torch.arange(5))
    assert symmetry_of(hidden, torch.arange(5), keep=lambda out: out.out) != []


def test_wrapped_models_are_those_inside():
    model, x = two_layers(F.relu), torch.randn(5, 8)
    expected = str(symmetry_of(model, x))
    assert str(symmetry_of(nn.DataParallel(model), x)) == expected
    assert str(symmetry_of(torch.compile(model, backend="eager"), x)) == expected


def test_a_batch_may_be_a_dict_and_parameters_may_be_integers():
    model = Functional(
        lambda m, batch: m.l1(F.relu(m.l0(batch["x"])))["y" == 1 :], **linear(8, 12, 4)
    )
    model.count = nn.Parameter(torch.arange(3), requires_grad=False)
    assert units(symmetry_of(model, {"x": torch.randn(5, 8)})) == 12


def test_a_model_on_the_meta_device_is_refused_in_a_sentence():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="meta"):
        symmetry_of(model, torch.randn(2, 3))


def test_the_run_leaves_no_trace_on_the_model():
    model = CASES["ResNet, training"].module
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x, state = torch.rand(4, 3, 16, 16), torch.get_rng_state()
    symmetry_of(nn.Sequential(model, nn.Dropout()), x)
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_run_leaves_what_it_writes_as_it_was():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.out = nn.Embedding(9, 12, max_norm=0.5), nn.Linear(12, 4)
            self.register_buffer("mask", torch.ones(1, 12).expand(5, 12))
            self.register_buffer("cache", None)

        def forward(self, tokens, x):
            self.cache = F.relu(self.token(tokens)) * self.mask
            self.out.weight.data.clamp_(-0.1, 0.1)
            return self.out(self.cache) + x.sub_(1)

    model, inputs = Model(), (torch.arange(5), torch.randn(5, 4))
    tensors = [*model.parameters(), *inputs]
    before = [t.detach().clone() for t in tensors]
    symmetry_of(model, *inputs)
    assert model.cache is None
    for t, copy in zip(tensors, before):
        assert torch.equal(t, copy)


def test_a_whole_model_may_run_in_inference_mode():
    model = two_layers(F.relu)
    model.forward = torch.inference_mode()(model.forward)
    assert units(symmetry_of(model, torch.randn(5, 8))) == 12


def test_a_scripted_model_is_refused_in_a_sentence():
    model = torch.jit.trace(nn.Linear(3, 2), torch.randn(1, 3))
    with pytest.raises(ValueError, match="ScriptModule"):
        symmetry_of(model, torch.randn(1, 3))


def test_it_says_what_ended_the_rest_and_shows_what_there_is():
    symmetry = symmetry_of(GPT(), torch.arange(6)[None])
    assert "gelu after fc" in symmetry.ended
    text = str(symmetry)
    assert "GL(8)" in text and "attn.weight[0]" in text and "128 units" in text
    none = symmetry_of(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(2, 3)
    )
    assert none == [] and none.ended == ["tanh after 0", "output after 2"]
    assert "0 units" in str(none)


def test_a_part_and_groups_by_hand_make_one_list():
    layers = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)
    model = nn.Sequential(*layers)
    by_hand = [Axis("0.weight", 0), Axis("0.bias", 0), Axis("2.weight", 1, -1)]
    symmetry = symmetry_of(model[2:], torch.randn(3, 6)) + [Group(RESCALING, 6, 1, by_hand)]
    assert units(symmetry) == units(symmetry_of(model, torch.randn(3, 8))) == 11
    assert check_symmetry(model, symmetry, torch.randn(3, 8)) < 1e-10
