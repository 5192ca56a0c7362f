"""symmetry_of: what theory gives is found, and what is found is right."""

import copy
import ctypes
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from parameter_symmetries import (
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
from symmetric_models import Functional
from symmetric_models import units as group_of_units
from traced_modules import all_cases, blocks_of, linear, resnet, tied_gpt, two_layers, units_of

CASES = {case.name: case for case in all_cases()}


def assert_right(model, symmetry, *inputs, units=None, blocks=None):
    """Assert that there are so many units, and so many GL(d), and that outputs stay."""
    assert units is None or units_of(symmetry) == units, symmetry
    assert blocks is None or blocks_of(symmetry) == blocks, symmetry
    if symmetry:
        check_symmetry(model, symmetry, *inputs)


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
    assert (units_of(symmetry), blocks_of(symmetry)) == (case.units, case.blocks), symmetry
    if symmetry:
        for inputs in (case.inputs, case.others):
            assert check_symmetry(case.module, symmetry, *inputs) < 1e-10
        for sign in (1, -1):
            assert change_by_one_side(case.module, symmetry, sign, case.others) > 1e-3


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.units], ids=lambda c: c.name)
def test_a_teleport_by_what_it_finds_raises_the_gradient(case):
    symmetry = symmetry_of(case.module, *case.inputs)
    case.module.zero_grad()
    sum(out.logsumexp(-1).mean() for out in floating(case.module(*case.inputs))).backward()
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
        assert_right(model, symmetry, others[:2])
        found += bool(symmetry)
    assert found > len(seeds) / 5  # or else the test says nothing


# Traps: each module has fewer symmetries than it seems, or more


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


def read_by_a_pointer_after_it_is_overwritten(x):
    zeros = torch.zeros_like(x)
    first = ctypes.c_float.from_address(zeros.data_ptr())
    zeros.copy_(x)
    return F.relu(zeros) * (1 + first.value)


def written_by_batch_norm(x):
    mean = torch.zeros(x.shape[1])
    F.batch_norm(torch.randn(5, 12), mean, torch.ones(12), training=True)
    return F.relu(x + mean)


def normalised_by_names(x):
    mean = F.relu(x).mean(0)
    fixed = torch.ones(5, 12)
    return F.relu(x) + F.batch_norm(fixed, mean, torch.ones(12), None, None, False)


def copied_into_integers(x):
    return F.relu(x) * (1 + torch.empty(x.shape, dtype=torch.int8).copy_(16 * x).abs())


def seen_as_integers_before_it_is_written(x):
    zeros = torch.zeros_like(x)
    integers = zeros.view(torch.int32)
    zeros.copy_(x)
    return F.relu(x) * (1 + integers.remainder(7))


def swapped_into_a_tensor(x):
    zeros = torch.zeros_like(x)
    y = zeros + 1
    zeros.data = x * 1
    return F.relu(x) * (y + zeros.abs())


@torch.library.custom_op("not_pytorch::relu", mutates_args=())
def clamp_called_relu(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(0, 1)


def transposed_in_place(x):
    view = x.view(-1)
    x.t_()
    return F.relu(x).t() + 0 * view.sum()


def compared_into(x):
    mask = torch.empty(0, dtype=torch.bool)
    torch.gt(x, 1, out=mask)
    return x * mask


WITHOUT = {
    "what Python reads": lambda x: F.relu(x) * (1 + x.max().item()),
    "what NumPy reads": lambda x: F.relu(x) * (1 + float(x.numpy().max() > 1)),
    "what a pointer reads": read_by_a_pointer_after_it_is_overwritten,
    "what is copied by Python": lambda x: F.relu(x) * (1 + copy.deepcopy(x).abs()),
    "a tensor of numbers": lambda x: F.relu(x) * (1 + torch.tensor([x.max(), x.min()]).sum()),
    "integers": copied_into_integers,
    "a view as integers": seen_as_integers_before_it_is_written,
    "a tensor that is swapped": swapped_into_a_tensor,
    "an operation of another library": clamp_called_relu,
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
    "ones in a slice": written_into_zeros(lambda z: z[:, :].fill_(1.0)),
    "running statistics, written": written_by_batch_norm,
    "running statistics, read": normalised_by_names,
    "what lies in empty memory": lambda x: F.relu(x) + torch.empty_like(x),
    "complex numbers": lambda x: F.relu(x) * torch.view_as_real(x * torch.full((12,), 1j)).sum(-1),
    "a sparse product": lambda x: F.relu(x) * (torch.ones(5, 12).to_sparse() * x).to_dense(),
    "a tensor filled with an entry": lambda x: F.relu(x) * torch.zeros_like(x).fill_(x.max()),
    "a view of what is transposed in place": transposed_in_place,
    "a comparison into a tensor": compared_into,
}


@pytest.mark.parametrize("between", WITHOUT.values(), ids=WITHOUT)
def test_what_bends_units_or_leaves_torch_has_no_symmetry(between):
    assert symmetry_of(two_layers(between), torch.randn(5, 8)) == []


def filled_by_slices(make):
    def between(x):
        cache = make(x)
        cache[:, :4], cache[:, 4:] = F.relu(x)[:, :4], F.relu(x)[:, 4:]
        return cache

    return between


KEPT = {
    "sign": lambda x: F.relu(x) * x.sign(),
    "a comparison with 0": lambda x: x * (x > 0),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "a root and its square": lambda x: F.relu(x).sqrt().square(),
    "a cube root of a cube": lambda x: F.relu(x) + F.relu(x).pow(3).pow(1 / 3),
    "in place, through a view": lambda x: (x.view(-1).relu_(), x)[1],
    "written into zeros": lambda x: torch.zeros_like(x).copy_(F.relu(x)),
    "slices of zeros": filled_by_slices(torch.zeros_like),
    "slices of an empty tensor": filled_by_slices(torch.empty_like),
    "slices of zeros that were added up": filled_by_slices(lambda x: torch.zeros_like(x).cumsum(1)),
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
    "a mean of images whose channels are last": lambda x: F.adaptive_avg_pool2d(
        F.relu(x)[:, :, None, None].expand(-1, -1, 2, 2).to(memory_format=torch.channels_last), 1
    ).flatten(1),
    "inference mode": torch.inference_mode()(F.relu),
    "a sum over nothing": lambda x: F.relu(x) + F.relu(x)[:0].sum(0),
    "a multiple that is subtracted": lambda x: F.relu(torch.rsub(x, 0, alpha=2)),
}


@pytest.mark.parametrize("between", KEPT.values(), ids=KEPT)
def test_what_lets_scales_through_keeps_each_unit(between):
    model = two_layers(between)
    symmetry = symmetry_of(model, torch.randn(5, 8))
    assert_right(model, symmetry, torch.randn(9, 8), units=12, blocks={})


def test_a_layer_may_have_one_unit():
    model = nn.Sequential(nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 2))
    assert_right(model, symmetry_of(model, torch.randn(5, 8)), torch.randn(9, 8), units=6)


def test_two_units_may_scale_one_entry():
    def read_twice(m, x):
        y = m.l0(x)
        return m.l1(y), (y * m.scale) @ y.roll(1, -1).mT  # by c_i and by c_{i+1}

    model = Functional(read_twice, **linear(8, 3, 4), scale=nn.Parameter(torch.rand(3)))
    assert_right(model, symmetry_of(model, torch.randn(5, 8)), torch.randn(9, 8), units=3)


def test_rows_that_are_mixed_up_are_not_offered_as_heads():
    def rolled_heads(m, x):
        """Two heads, whose entries move by one: the first of each is in the other head's row."""
        y = torch.stack([m.l0(x), m.l0(x).roll(1, 0)], 1).flatten(1)
        return m.l1(y.roll(1, 1)) + m.l2(y)

    model = Functional(rolled_heads, l0=nn.Linear(8, 4), l1=nn.Linear(8, 3), l2=nn.Linear(8, 3))
    symmetry = symmetry_of(model, torch.randn(5, 8))
    assert_right(model, symmetry, torch.randn(9, 8), units=4, blocks={4: 1})


def test_the_default_type_may_be_short():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        assert units_of(symmetry_of(model, torch.randn(2, 8))) == 6
    finally:
        torch.set_default_dtype(torch.float32)


def difference(a, b):
    return torch.cat([(a + b)[:, :3], (a - b)[:, 3:]], 1)


def scaled(a, b):
    return torch.cat([(a + b)[:, :3], torch.add(a, b, alpha=2)[:, 3:]], 1)


def subtracted_from_zero(a, b):
    return torch.cat([a[:, :3], 0 - a[:, 3:]], 1)


@pytest.mark.parametrize("join", [difference, scaled, subtracted_from_zero])
def test_units_of_other_signs_or_factors_are_not_mixed(join):
    layers = {"l0": nn.Linear(8, 6), "l1": nn.Linear(8, 6), "l2": nn.Linear(6, 4)}
    model = Functional(lambda m, x: m.l2(join(m.l0(x), m.l1(x))), **layers)
    symmetry = symmetry_of(model, torch.randn(5, 8))
    assert_right(model, symmetry, torch.randn(9, 8), units=6, blocks={3: 2})


def own_rows(h, index):
    """Put the rows of each unit where its own index says."""
    return torch.zeros_like(h).scatter(1, index.expand(h.shape), h)


def test_units_that_are_put_or_taken_by_an_index_of_their_own_are_not_mixed():
    index = torch.stack([torch.randperm(4) for _ in range(6)], 1)
    for between in (lambda h: own_rows(h, index), lambda h: h.gather(1, index.expand(h.shape))):
        model, x = two_layers(between, 8, 6, 4), torch.randn(2, 4, 8)
        assert_right(model, symmetry_of(model, x), torch.randn(3, 4, 8), units=6, blocks={})


def test_fixed_depthwise_filters_and_experts_without_tokens_keep_units():
    blur = torch.ones(6, 1, 3, 3)
    layers = {"l0": nn.Conv2d(3, 6, 3), "l1": nn.Conv2d(6, 4, 3)}
    model = Functional(lambda m, x: m.l1(F.conv2d(F.relu(m.l0(x)), blur, groups=6)), **layers)
    x = torch.randn(1, 3, 9, 9)
    assert_right(model, symmetry_of(model, x), x, units=6)
    idle = Functional(lambda m, x: m.l1(F.relu(m.l0(x))) + m.e(x[:0]).sum(), **linear(8, 12, 4))
    idle.e = nn.Linear(8, 4)
    assert_right(idle, symmetry_of(idle, torch.randn(5, 8)), torch.randn(9, 8), units=12)


def test_positions_and_rows_that_did_not_run_stay_where_they_are():
    def forward(m, tokens):
        return m.out(F.relu(m.token(tokens) + m.position[: tokens.shape[1]]))

    layers = {"token": nn.Embedding(50, 8), "position": nn.Parameter(torch.randn(20, 8))}
    model = Functional(forward, **layers, out=nn.Linear(8, 4))
    symmetry = symmetry_of(model, torch.tensor([[1, 2, 3]]))
    assert_right(model, symmetry, torch.randint(50, (4, 20)), units=8)


def test_experts_of_one_parameter_that_no_sample_took_have_no_group():
    def take(m, x, expert):
        return F.relu(x @ m.up[expert]) @ m.down[expert]

    layers = {"up": nn.Parameter(torch.randn(3, 8, 6)), "down": nn.Parameter(torch.randn(3, 6, 4))}
    model, x = Functional(take, **layers), torch.randn(5, 8)
    assert symmetry_of(model, x, 1) == []
    model.function = lambda m, x: torch.stack([take(m, x, k) for k in range(3)])
    assert_right(model, symmetry_of(model, x), torch.randn(9, 8), units=18)


def test_weights_that_are_tied_or_normalised_have_fewer_groups():
    names = {axis.name for g in symmetry_of(tied_gpt(), torch.arange(6)[None]) for axis in g.axes}
    assert "tokens.weight" not in names and names
    x = torch.randn(5, 8)
    model = two_layers(F.relu)
    parametrizations.spectral_norm(model.l0)
    assert symmetry_of(model, x) == []
    model = two_layers(F.relu, 8, 8, 8)
    model.l1.weight.data = model.l0.weight.data  # the same memory, which autograd does not know
    assert symmetry_of(model, x) == []
    twice = Functional(lambda m, x: m.l1(F.relu(m.l0(F.relu(m.l0(x))))), **linear(8, 8, 4))
    assert symmetry_of(twice, x) == []
    model = two_layers(F.relu)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector, model.parameters())  # one memory, side by side
    assert units_of(symmetry_of(model, x)) == 12


def test_a_cache_among_the_outputs_fixes_keys_and_values():
    def attend(m, x):
        q, k, v = (layer(x) for layer in (m.l0, m.l1, m.l2))
        return {"logits": m.out(F.scaled_dot_product_attention(q, k, v)), "cache": (k, v)}

    model, x = Functional(attend, **linear(8, 8, 8, 8), out=nn.Linear(8, 3)), torch.randn(2, 5, 8)
    assert symmetry_of(model, x) == []
    symmetry = symmetry_of(model, x, keep=lambda out: out["logits"])
    assert blocks_of(symmetry) == {8: 2}
    assert check_symmetry(model, symmetry, x, keep=lambda out: out["logits"]) < 1e-10


def test_what_is_kept_may_be_computed_from_the_outputs_and_must_be_there():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = nn.Parameter(torch.eye(8))
    residual = Functional(lambda m, x: m.net[0](x) + m.net(x), net=model)
    assert symmetry_of(residual, torch.arange(5), keep=lambda out: out.softmax(-1)) == []
    hidden = Functional(lambda m, x: SimpleNamespace(out=m.net(x)), net=model)
    with pytest.raises(ValueError, match="keep="):
        symmetry_of(hidden, torch.arange(5))
    assert symmetry_of(hidden, torch.arange(5), keep=lambda out: out.out) != []


def test_wrapped_models_are_those_inside_and_a_part_and_groups_by_hand_make_one_list():
    layers = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)
    model, x = nn.Sequential(*layers), torch.randn(3, 8)
    expected = str(symmetry_of(model, x))
    assert str(symmetry_of(nn.DataParallel(model), x)) == expected
    assert str(symmetry_of(torch.compile(model, backend="eager"), x)) == expected
    by_hand = group_of_units(6, [("0.weight", 0), ("0.bias", 0)], [("2.weight", 1)])
    symmetry = symmetry_of(model[2:], torch.randn(3, 6)) + [by_hand]
    assert_right(model, symmetry, x, units=11)


def test_a_batch_may_be_a_dict_and_parameters_may_be_integers():
    model = Functional(lambda m, batch: m.l1(F.relu(m.l0(batch["x"]))), **linear(8, 12, 4))
    model.count = nn.Parameter(torch.arange(3), requires_grad=False)
    assert units_of(symmetry_of(model, {"x": torch.randn(5, 8)})) == 12


def test_models_that_cannot_be_watched_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="meta"):
        symmetry_of(nn.Linear(3, 2, device="meta"), torch.randn(1, 3))
    with pytest.raises(ValueError, match="ScriptModule"):
        symmetry_of(torch.jit.trace(nn.Linear(3, 2), torch.randn(1, 3)), torch.randn(1, 3))


def test_the_run_leaves_no_trace():
    def forward(m, images, tokens, x):
        m.cache = F.relu(m.token(tokens)) * m.mask
        m.out.weight.data.clamp_(-0.1, 0.1)
        return m.out(m.cache) + x.sub_(1), m.resnet(F.dropout(images))

    layers = {"token": nn.Embedding(9, 12, max_norm=0.5), "out": nn.Linear(12, 4)}
    model = Functional(forward, **layers, resnet=resnet())
    model.register_buffer("mask", torch.ones(1, 12).expand(5, 12))
    model.register_buffer("cache", None)
    inputs = torch.rand(4, 3, 16, 16), torch.arange(5), torch.randn(5, 4)
    tensors = [*model.state_dict().values(), *inputs]
    before, random_state = [t.clone() for t in tensors], torch.get_rng_state()
    symmetry_of(model, *inputs)
    assert model.cache is None and torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, before))


def test_it_says_what_ended_the_rest_and_shows_what_there_is():
    symmetry = symmetry_of(tied_gpt(), torch.arange(6)[None])
    assert "gelu after blocks.0.fc" in symmetry.ended
    text = str(symmetry)
    assert "GL(8)" in text and "blocks.0.attn.weight[0]" in text and "128 units" in text
    none = symmetry_of(two_layers(torch.tanh), torch.randn(5, 8))
    assert none == [] and none.ended == ["tanh after l0", "output after l1"]
    assert "0 units" in str(none)
