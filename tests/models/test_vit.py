"""The vision transformer: equal to torch's own layers, any image shape without a pixel lost, whole heads at every width, and vmap."""
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from hpcfl.errors import JobError
from hpcfl.models import zoo
from hpcfl.models.vit import Attention, Block, Patches

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
DIM, HEADS, HIDDEN = 24, 4, 40


def test_a_block_is_the_encoder_layer_of_torch_with_the_same_weights():
    block, other = Block(DIM, HEADS, HIDDEN), nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, 0.0, "gelu", batch_first=True, norm_first=True)
    mine, three = block.attention, (block.attention.q, block.attention.k, block.attention.v)
    biases = [mine.q.bias, torch.zeros(DIM), mine.v.bias]          # softmax is blind to a bias of k
    other.load_state_dict({
        "self_attn.in_proj_weight": torch.cat([layer.weight for layer in three]), "self_attn.in_proj_bias": torch.cat(biases),
        "self_attn.out_proj.weight": mine.out.weight, "self_attn.out_proj.bias": mine.out.bias,
        **{f"{name}.{leaf}": getattr(layer, leaf) for leaf in ("weight", "bias") for name, layer in
           {"norm1": block.norm1, "norm2": block.norm2, "linear1": block.mlp.linear1, "linear2": block.mlp.linear2}.items()}})
    x = torch.randn(3, 7, DIM)
    torch.testing.assert_close(block(x), other(x), rtol=1e-5, atol=1e-5)


def test_attention_that_asks_for_nothing_is_the_mean_over_tokens():
    attention = Attention(DIM, HEADS)
    for leaf in attention.q.parameters():
        nn.init.zeros_(leaf)
    x = torch.randn(2, 5, DIM)
    wanted = attention.out(attention.v(x).mean(1, keepdim=True).expand(2, 5, DIM))
    torch.testing.assert_close(attention(x), wanted, rtol=1e-5, atol=1e-6)


def test_the_four_weights_of_attention_are_linear_layers_of_their_own():
    attention = zoo.build("vit", GREY, 10).body.block1.attention
    assert {name: type(layer) for name, layer in attention.named_children()} == dict.fromkeys(("q", "k", "v", "out"), nn.Linear)


@pytest.mark.parametrize("shape, patch, tokens", [((1, 8, 8), (2, 2), 16), (GREY, (4, 4), 49), (COLOUR, (4, 4), 64), ((3, 64, 64), (8, 8), 64),
                                                  ((1, 30, 30), (4, 4), 64), ((1, 36, 36), (5, 5), 64), ((1, 25, 25), (4, 4), 49),
                                                  ((1, 90, 250), (12, 32), 64), ((1, 1, 1), (2, 2), 1)])
def test_an_image_of_any_shape_becomes_at_most_64_tokens_and_no_pixel_is_lost(shape, patch, tokens):
    patches, x = Patches(shape, 8), torch.randn(1, *shape, requires_grad=True)
    z = patches(x)
    assert patches.conv.kernel_size == patches.conv.stride == patch and z.shape == (1, tokens, 8)
    z.square().sum().backward()
    assert x.grad.ne(0).all()


def test_positions_alone_tell_where_a_patch_is():
    model = zoo.build("vit", (1, 16, 16), 10).eval()
    x = torch.randn(1, 1, 16, 16)
    turned = x.roll(2, 3)                                          # by one patch
    assert not torch.allclose(model(x), model(turned), atol=1e-4)
    nn.init.zeros_(model.body.patches.positions)
    torch.testing.assert_close(model(x), model(turned), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [1.0, 0.75, 0.5625, 0.42, 0.25])
def test_a_width_shrinks_the_size_of_a_head_and_keeps_their_number(width):
    block = zoo.build(f"vit@{width}", COLOUR, 10).body.block3
    assert block.attention.heads == 4 and block.attention.q.out_features == block.norm1.normalized_shape[0] == 4 * int(16 * width)
    assert block.mlp.linear1.out_features == int(128 * width)


def test_a_width_that_leaves_nothing_of_a_head_is_refused():
    with pytest.raises(JobError, match="'vit@0.06': a hidden layer of 16 channels has none left"):
        zoo.build("vit@0.06", COLOUR, 10)


def test_it_has_the_parameters_of_its_sizes():
    block = (4 * 64 * 64 + 3 * 64) + (64 * 128 + 128) + (128 * 64 + 64) + 4 * 64
    assert sum(leaf.numel() for leaf in zoo.build("vit", COLOUR, 10, 0).parameters()) == (48 * 64 + 64) + 64 * 64 + 4 * block + 128 + (64 * 10 + 10)


def test_gradients_of_stacked_clients_by_vmap_equal_those_of_each_and_nothing_falls_back_to_a_loop():
    models, x = [zoo.build("vit", GREY, 10) for _ in range(3)], torch.randn(3, 4, *GREY)
    y = torch.randint(10, (3, 4))

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(models[0], parameters, (x,)), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                             # torch warns where an operator has no rule under vmap
        together = vmap(grad(loss))(stack_module_state(models)[0], x, y)
    for row, model in enumerate(models):
        each = torch.autograd.grad(F.cross_entropy(model(x[row]), y[row]), list(model.parameters()))
        for (path, _), wanted in zip(model.named_parameters(), each, strict=True):
            torch.testing.assert_close(together[path][row], wanted, rtol=1e-3, atol=1e-5)


def test_training_reaches_every_parameter_and_has_the_same_bits_twice():
    def train():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            model, x, y = zoo.build("vit", (1, 8, 8), 2), torch.randn(32, 1, 8, 8), torch.arange(32) % 2
        x[y == 1, :, :4] += 1.0                                    # the classes differ in the upper half
        optimizer, before = torch.optim.Adam(model.parameters(), 1e-3), [leaf.detach().clone() for leaf in model.parameters()]
        for _ in range(30):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.item(), before, list(model.parameters())
    loss, before, after = train()
    assert loss < 0.2
    assert all(torch.isfinite(new).all() and (new - old).abs().max() > 1e-3 for old, new in zip(before, after, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(after, train()[2], strict=True))
